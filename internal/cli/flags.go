package cli

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/spelling"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// choice is a flag with a fixed set of values.
type choice struct {
	value   string
	allowed []string
}

func newChoice(byDefault string, allowed ...string) *choice { return &choice{byDefault, allowed} }

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return strings.Join(c.allowed, "|") }
func (c *choice) Set(s string) error {
	if !slices.Contains(c.allowed, s) {
		return fmt.Errorf("%q is none of %s", s, strings.Join(c.allowed, ", "))
	}
	c.value = s
	return nil
}

// count is a flag with a whole number from 1 up. 0 means that it was not given.
type count struct {
	value int32
	what  string
}

func (c *count) String() string {
	if c.value == 0 {
		return ""
	}
	return strconv.Itoa(int(c.value))
}
func (c *count) Type() string { return "N" }
func (c *count) Set(s string) error {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n < 1 {
		return fmt.Errorf("%q is no number of %s: it takes a whole number from 1 up", s, c.what)
	}
	c.value = int32(n)
	return nil
}

// text is a flag with a name of something.
type text string

func (t *text) String() string     { return string(*t) }
func (t *text) Type() string       { return "NAME" }
func (t *text) Set(s string) error { *t = text(s); return nil }

// groupFlag is a pair of flags, --network-group NAME and --no-network-group; nil if neither was given.
type groupFlag struct{ value *string }

func (g *groupFlag) add(f *pflag.FlagSet, help, noHelp string) {
	const name = "network-group"
	given := func(to string) error {
		if g.value != nil && *g.value != to {
			return fault.New(fault.Invalid, "--"+name, "a VM is in one group: it is given twice, or together with --no-%s", name)
		}
		g.value = &to
		return nil
	}
	f.Var(nameFlag(func(s string) error {
		if s == "" {
			return fault.New(fault.Invalid, "--"+name, "is empty").WithHint("write --no-%s to take it out of its group", name)
		}
		if err := vm.ValidateNetworkGroup(s); err != nil {
			return err
		}
		return given(s)
	}), name, help)
	f.BoolFunc("no-"+name, noHelp, func(s string) error {
		if on, err := strconv.ParseBool(s); err != nil || !on {
			return fault.New(fault.Invalid, "--no-"+name, "takes no value")
		}
		return given("")
	})
}

// nameFlag is a flag with a name of something, which is looked at when it is given.
type nameFlag func(string) error

func (n nameFlag) String() string     { return "" }
func (n nameFlag) Type() string       { return "NAME" }
func (n nameFlag) Set(s string) error { return n(s) }

// size is a flag with a size, read as the domain reads it everywhere. 0 means that it was not given.
type size struct {
	value int64
	what  string
	parse func(what, s string) (int64, error)
}

func (f *size) String() string { return "" }
func (f *size) Type() string   { return "SIZE" }
func (f *size) Set(s string) (err error) {
	f.value, err = f.parse(f.what, s)
	if err == nil && f.value == 0 {
		err = fault.New(fault.Invalid, f.what, "%q is zero", s)
	}
	return err
}

// labels is a repeatable flag of key=value pairs.
type labels map[string]string

func (l labels) String() string { return "" }
func (l labels) Type() string   { return "KEY=VALUE" }
func (l labels) Set(s string) error {
	key, value, ok := strings.Cut(s, "=")
	if !ok || key == "" {
		return fmt.Errorf("%q is no label: write key=value", s)
	}
	if old, ok := l[key]; ok && old != value {
		return fmt.Errorf("label %q is given twice", key)
	}
	l[key] = value
	return nil
}

// signalFlag is a flag with a signal: TERM, SIGTERM or 15.
type signalFlag struct{ number int }

func (f *signalFlag) String() string {
	if f.number == 0 {
		return ""
	}
	return strings.TrimPrefix(unix.SignalName(unix.Signal(f.number)), "SIG")
}
func (f *signalFlag) Type() string { return "SIGNAL" }
func (f *signalFlag) Set(s string) error {
	if n, err := strconv.Atoi(s); err == nil && n > 0 && unix.SignalName(unix.Signal(n)) != "" {
		f.number = n
		return nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		f.number = int(n)
		return nil
	}
	return fmt.Errorf("%q is no signal: write TERM, KILL, INT, or a number", s)
}

// nearestFlag is the command's flag that name was probably meant to be, or "".
func nearestFlag(cmd *cobra.Command, name string) string {
	best, distance := "", 3
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		d := spelling.Distance(name, f.Name)
		if strings.HasPrefix(f.Name, name) && len(name) >= 3 {
			d = 1
		}
		if !f.Hidden && d < distance {
			best, distance = f.Name, d
		}
	})
	return best
}
