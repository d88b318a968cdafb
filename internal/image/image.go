// Package image owns what an image and a kernel are: names for captured, content-addressed artifacts.
//
// It is the domain: it imports only internal/fault and does no I/O. internal/bundle reads where
// artifacts come from, internal/disk captures them, internal/store keeps the records.
package image

import (
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Image is a name for a root filesystem that VMs can be made from. Everything it points to was
// captured by content when it was registered, so that overwriting the source changes nothing.
type Image struct {
	ID        string    `json:"id"`       // 32 hex digits; changes when the content behind the name changes
	Name      string    `json:"name"`     // unique
	Base      string    `json:"base"`     // content id of the root filesystem (ext4, raw)
	Seed      string    `json:"seed"`     // content id of the work seed, "" for none
	Kernel    string    `json:"kernel"`   // content id of the kernel it boots with, "" for the one of the default image
	Managed   bool      `json:"managed"`  // made by banger; false: registered from a file
	Source    string    `json:"source"`   // path it was captured from, for people
	Packages  string    `json:"packages"` // path of the package list, for people
	SizeBytes int64     `json:"size_bytes"`
	CreatedAt time.Time `json:"created_at"`
	// Config is what the image says of the programs that run in it; nil: nothing, it has an init of its own.
	Config *Config `json:"config,omitempty"`
}

// Config is what an image that was made for containers says of the programs that run in it. A zero value
// says nothing.
type Config struct {
	Environment map[string]string `json:"environment,omitempty"`
	User        string            `json:"user,omitempty"` // user[:group], names or numbers
	WorkingDir  string            `json:"working_dir,omitempty"`
	Command     []string          `json:"command,omitempty"` // with its arguments; what init is to run if the image has none of its own
	NoInit      bool              `json:"no_init,omitempty"` // the image has no init of its own
}

// Kernel is what any root filesystem can be booted with. Its parts are captured by content, each a
// file of its own.
type Kernel struct {
	ID            string    `json:"id"`      // content id over its files
	Version       string    `json:"version"` // uname -r of it, and the name of its modules directory
	ForeignInitrd bool      `json:"foreign_initrd"`
	Files         []string  `json:"files"` // content ids: vmlinux, initrd.img, modules.ext4, and foreign.img if there is one
	CreatedAt     time.Time `json:"created_at"`
}

// maxName is as long as a host name may be: people name VMs after images.
const maxName = 63

// ValidateName checks the name of an image: 1 to 63 of a-z, 0-9, dots, hyphens and underscores, a letter or digit
// first. fault.Invalid.
func ValidateName(name string) error {
	const allowed = "abcdefghijklmnopqrstuvwxyz0123456789"
	var bad string
	switch {
	case name == "":
		bad = "is empty"
	case len(name) > maxName:
		bad = "is longer than 63 characters"
	case strings.ContainsFunc(name, func(r rune) bool { return !strings.ContainsRune(allowed+"._-", r) }):
		bad = "has other characters than a-z, 0-9, dots, hyphens and underscores"
	case !strings.ContainsRune(allowed, rune(name[0])):
		bad = "does not begin with a letter or digit"
	default:
		return nil
	}
	return fault.New(fault.Invalid, name, "is no name for an image: it %s", bad).WithHint("choose one such as docker-dev")
}
