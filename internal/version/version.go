// Package version owns what a build says of itself. It never decides what versions fit together:
// that is the API revision's business (api/banger/v1).
package version

import (
	"runtime/debug"
	"sync"
)

// release is set by the linker in released builds: -ldflags "-X .../internal/version.release=1.2.3".
var release string

// Info is what is known of this build.
type Info struct {
	Version string `json:"version"` // "1.2.3", or "devel"
	Commit  string `json:"commit"`  // "" if the build had no repository
	Dirty   bool   `json:"dirty"`   // the tree had changes that were not committed
}

// Get returns what is known of this build.
var Get = sync.OnceValue(func() Info {
	info := Info{Version: release}
	if info.Version == "" {
		info.Version = "devel"
	}
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return info
	}
	for _, setting := range build.Settings {
		switch setting.Key {
		case "vcs.revision":
			info.Commit = setting.Value
		case "vcs.modified":
			info.Dirty = setting.Value == "true"
		}
	}
	return info
})

// String is the version in one word for people: a release's number, what `git describe` says of a
// checkout, or "devel (0123456789ab)" for a build by the go command alone.
func String() string {
	info := Get()
	if info.Commit == "" || info.Version != "devel" {
		return info.Version
	}
	s := info.Version + " (" + info.Commit[:min(12, len(info.Commit))]
	if info.Dirty {
		s += ", modified"
	}
	return s + ")"
}
