package boot

import (
	"encoding/json"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// ContainerPath is where the root filesystem of an image that was made for containers says what is to run in it.
// It lies in the image itself, so that it is of the content that VMs are made from, and goes where that goes.
// Whoever is root in a guest may change it for the guest's next start.
const ContainerPath = "/etc/banger/image.json"

// SSHServerPath is where an image without an init has banger's SSH server, which was put there when it was pulled.
const SSHServerPath = "/usr/lib/banger/sshd"

// ContainerVersion is the version of Container.
const ContainerVersion = 1

// MaxContainerSize bounds the file at ContainerPath, in bytes.
const MaxContainerSize = 1 << 20

// Container is what an OCI image's config says of the programs that run in it.
type Container struct {
	Version   int    `json:"version"`
	Reference string `json:"reference"`        // what the image was pulled by, for people
	Digest    string `json:"digest,omitempty"` // of its manifest
	// NoInit says that banger's own init is to run as process 1: the image has none that would work.
	NoInit bool `json:"no_init"`
	// Command is entrypoint and arguments; banger's own init runs it. Empty: nothing is to run.
	Command     []string `json:"command,omitempty"`
	Environment []string `json:"environment,omitempty"` // NAME=value
	User        string   `json:"user,omitempty"`        // user[:group], names or numbers
	WorkingDir  string   `json:"working_dir,omitempty"`
	StopSignal  string   `json:"stop_signal,omitempty"` // name or number; "" is SIGTERM
}

// ParseContainer reads the file at ContainerPath. fault.Corrupt, or VersionSkew if it is of a newer banger.
func ParseContainer(b []byte) (Container, error) {
	var c Container
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fault.Wrap(err, fault.Corrupt, ContainerPath, "is damaged")
	}
	switch {
	case c.Version > ContainerVersion:
		return c, fault.New(fault.VersionSkew, ContainerPath, "has version %d, and %d is the newest that is known", c.Version, ContainerVersion)
	case c.Version < 1:
		return c, fault.New(fault.Corrupt, ContainerPath, "has no version")
	}
	for _, text := range append(append([]string{c.User, c.WorkingDir}, c.Command...), c.Environment...) {
		if strings.ContainsRune(text, 0) {
			return c, fault.New(fault.Corrupt, ContainerPath, "holds a zero byte, which no program can be given")
		}
	}
	return c, nil
}

// Encode renders the file at ContainerPath.
func (c Container) Encode() ([]byte, error) {
	c.Version = ContainerVersion
	b, err := json.MarshalIndent(c, "", "  ")
	return append(b, '\n'), err
}

// SessionEnvironment are the variables that /etc/environment can hold, by name: what sessions in the guest get.
func (c Container) SessionEnvironment() map[string]string {
	out := map[string]string{}
	for _, e := range c.Environment {
		name, value, ok := strings.Cut(e, "=")
		if ok && name != "" && !strings.ContainsAny(name, "\n\x00 \t#\"'") && !strings.ContainsAny(value, "\n\x00") {
			out[name] = value
		}
	}
	return out
}
