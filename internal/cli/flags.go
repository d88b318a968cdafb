package cli

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
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

// size is a flag with a number of bytes. bare is what a number without a unit counts in; 0 refuses
// it. 0 bytes means that it was not given.
type size struct {
	bytes int64
	what  string
	bare  int64
}

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
	tib = 1 << 40
)

func (f *size) String() string {
	if f.bytes == 0 {
		return ""
	}
	return formatBytes(f.bytes)
}
func (f *size) Type() string { return "SIZE" }
func (f *size) Set(s string) error {
	n, err := parseSize(s, f.bare)
	if err != nil {
		return fmt.Errorf("%q is no size for %s: %w", s, f.what, err)
	}
	f.bytes = n
	return nil
}

// parseSize reads 4G, 4GiB, 512M, 1.5T, 65536K; powers of 1024 whichever way they are written, as
// RAM and disks of virtual machines are sized.
func parseSize(s string, bare int64) (int64, error) {
	number := strings.TrimRight(s, "BbIiKkMmGgTt")
	unit := strings.ToUpper(s[len(number):])
	var factor int64
	switch unit {
	case "":
		if factor = bare; bare == 0 {
			return 0, fmt.Errorf("it needs a unit, as in %sG", nonEmpty(s, "16"))
		}
	case "K", "KB", "KIB":
		factor = kib
	case "M", "MB", "MIB":
		factor = mib
	case "G", "GB", "GIB":
		factor = gib
	case "T", "TB", "TIB":
		factor = tib
	default:
		return 0, fmt.Errorf("the units are K, M, G and T, as in 4G, 4GiB or 512M")
	}
	n, err := strconv.ParseFloat(number, 64)
	switch {
	case err != nil || math.IsNaN(n) || strings.ContainsAny(number, "eExXpP_"):
		return 0, fmt.Errorf("write it as in 4G, 4GiB or 512M")
	case n <= 0:
		return 0, fmt.Errorf("it must be more than nothing")
	case n*float64(factor) >= math.MaxInt64:
		return 0, fmt.Errorf("it is more than any machine has")
	case n*float64(factor) < 1:
		return 0, fmt.Errorf("it is less than a byte")
	}
	return int64(n * float64(factor)), nil
}

func nonEmpty(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
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
		d := editDistance(name, f.Name)
		if strings.HasPrefix(f.Name, name) && len(name) >= 3 {
			d = 1
		}
		if !f.Hidden && d < distance {
			best, distance = f.Name, d
		}
	})
	return best
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
