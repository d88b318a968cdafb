package bundle

import (
	"bytes"
	"os"
	"path/filepath"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// EnvDir names the environment variable that overrides where the bundle is.
const EnvDir = "BANGER_RUNTIME_DIR"

// Location is where the bundle should be, and who says so. The directory may not exist: Load tells.
type Location struct {
	Dir    string // absolute
	Source string // "BANGER_RUNTIME_DIR", "runtime_dir", "checkout" or "installation"
}

// Locate decides where the bundle is: the environment variable, else configured (the setting
// runtime_dir, "" if unset), else ./runtime beside an executable that lies in a source checkout,
// else ../lib/banger relative to the executable's directory. Relative settings are relative to the working directory.
func Locate(configured string) (Location, error) {
	exe, err := os.Executable()
	if err == nil {
		// A link in ~/bin to the checkout's program is a program of the checkout.
		exe, err = filepath.EvalSymlinks(exe)
	}
	if err != nil {
		exe = "" // it was deleted or replaced while it runs; only the settings can tell
	}
	return locate(os.Getenv(EnvDir), configured, exe)
}

func locate(env, configured, exe string) (Location, error) {
	loc := Location{}
	switch {
	case env != "":
		loc = Location{env, EnvDir}
	case configured != "":
		loc = Location{configured, "runtime_dir"}
	case exe == "":
		return loc, fault.New(fault.NotFound, "runtime bundle", "cannot be found: this program's own file is gone").
			WithHint("start it again, or set %s", EnvDir)
	case isCheckout(filepath.Dir(exe)):
		loc = Location{filepath.Join(filepath.Dir(exe), "runtime"), "checkout"}
	default:
		loc = Location{filepath.Join(filepath.Dir(exe), "..", "lib", "banger"), "installation"}
	}
	abs, err := filepath.Abs(loc.Dir)
	if err != nil {
		return loc, fault.Wrap(err, fault.Invalid, loc.Dir, "is no usable path (%s)", loc.Source)
	}
	loc.Dir = abs
	return loc, nil
}

// isCheckout says whether dir is the root of banger's source.
func isCheckout(dir string) bool {
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	line, _, _ := bytes.Cut(mod, []byte("\n"))
	return err == nil && string(bytes.TrimSpace(line)) == "module git.thaloco.com/thaloco/banger"
}

// Repair says what to type to get a whole bundle into dir.
func Repair(dir string) string {
	if root := filepath.Dir(dir); filepath.Base(dir) == "runtime" && isCheckout(root) {
		return "run 'make runtime' in " + root
	}
	return "install banger again ('make install' in its source checkout), or name another bundle by " + EnvDir + " or runtime_dir"
}
