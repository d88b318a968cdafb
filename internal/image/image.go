// Package image owns what an image and a kernel are: names for captured, content-addressed artifacts.
//
// It is the domain: it imports only internal/fault and does no I/O. internal/bundle reads where
// artifacts come from, internal/disk captures them, internal/store keeps the records.
package image

import "time"

// Image is a name for a root filesystem that VMs can be made from. Everything it points to was
// captured by content when it was registered, so that overwriting the source changes nothing.
type Image struct {
	ID        string    `json:"id"`   // 32 hex digits; changes when the content behind the name changes
	Name      string    `json:"name"` // unique
	Base      string    `json:"base"` // content id of the root filesystem (ext4, raw)
	Seed      string    `json:"seed"` // content id of the work seed, "" for none
	Kernel    string    `json:"kernel"`
	Managed   bool      `json:"managed"`  // made by banger; false: registered from a file
	Source    string    `json:"source"`   // path it was captured from, for people
	Packages  string    `json:"packages"` // path of the package list, for people
	SizeBytes int64     `json:"size_bytes"`
	CreatedAt time.Time `json:"created_at"`
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
