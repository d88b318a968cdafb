// Package config owns settings and paths: what config.toml and the environment may say, the
// defaults, and where state, cache and socket lie.
//
// It reads; it makes no directory except by the Ensure methods of Paths, never writes config.toml,
// and does not check that configured files exist: whoever uses one does, and names it.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/spelling"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Config is the settings after file, environment and defaults. Paths are absolute; "" means not set,
// which the users of those fields take as "from the runtime bundle".
type Config struct {
	LogLevel    slog.Level
	RuntimeDir  string // the runtime bundle; "" for the one beside the executable
	TapPoolSize int

	FirecrackerBin  string // path, or a name to look up in PATH
	NamegenPath     string // likewise
	CustomizeScript string
	VsockAgentPath  string

	DefaultRootfs       string
	DefaultWorkSeed     string
	DefaultBaseRootfs   string
	DefaultKernel       string
	DefaultInitrd       string
	DefaultModulesDir   string
	DefaultPackagesFile string

	// Where image builds get what they install (internal/imagebuild says the form); "" is the pinned place.
	MiseSource          string
	OpencodeSource      string
	TmuxResurrectSource string
	TmuxContinuumSource string
	MetricsListenAddr   string // where metrics are, beside the API socket: IP address and port; "" for nowhere

	DNSListenAddr string // where names under .vm are answered: IP address and port; "" for nowhere

	VMM               string // auto, firecracker, qemu
	Jailer            string // auto, on, off: whether Firecracker runs in a jail
	DefaultVCPU       int
	DefaultMemoryMiB  int64
	DefaultDiskSize   int64 // bytes
	DefaultSystemSize int64 // bytes

	Network             string       // auto, bridge, user, none
	BridgeName          string       // of the bridge network
	CIDR                netip.Prefix // IPv4 range of the guests, its first address the host's
	IPv6CIDR            string       // likewise, a unique local /64, or IPv6Auto or IPv6None
	DefaultNAT          bool
	DefaultNetworkGroup string // "" for none
	HostPorts           Ports  // that guests on the bridge reach of the host, at most network.MaxHostPorts
	PublishedPorts      Ports  // of VMs on the user network; nil: those that their guests listen on

	BootTimeout time.Duration
	StopTimeout time.Duration
	SSHReminder bool // say after an SSH session that its VM still runs
}

// Values of the key vmm.
const (
	VMMAuto        = "auto"
	VMMFirecracker = "firecracker"
	VMMQEMU        = "qemu"
)

// Values of the key jailer.
const (
	JailerAuto = "auto" // where there is one
	JailerOn   = "on"   // or not at all
	JailerOff  = "off"
)

// Values of the key network.
const (
	NetworkAuto   = "auto"
	NetworkBridge = "bridge"
	NetworkUser   = "user"
	NetworkNone   = "none"
)

// Words that the key ipv6_cidr may be.
const (
	IPv6Auto = "auto" // a range that derives from the installation
	IPv6None = "none"
)

// maxTapPool is what fits into the bridge's /24.
const maxTapPool = 250

// key is one setting. value is an int64, a string, a bool or another TOML type as decoded.
type key struct {
	name string
	set  func(c *Config, l loader, value any) error
	show func(c Config) string // the value as it would be written in config.toml
}

var keys = []key{
	{"log_level",
		func(c *Config, _ loader, v any) error { return setLevel(&c.LogLevel, v) },
		func(c Config) string { return strings.ToLower(c.LogLevel.String()) }},
	pathKey("runtime_dir", func(c *Config) *string { return &c.RuntimeDir }),
	intKey("tap_pool_size", 0, maxTapPool, func(c *Config) *int { return &c.TapPoolSize }),
	programKey("firecracker_bin", func(c *Config) *string { return &c.FirecrackerBin }),
	programKey("namegen_path", func(c *Config) *string { return &c.NamegenPath }),
	pathKey("customize_script", func(c *Config) *string { return &c.CustomizeScript }),
	pathKey("vsock_agent_path", func(c *Config) *string { return &c.VsockAgentPath }),
	pathKey("default_rootfs", func(c *Config) *string { return &c.DefaultRootfs }),
	pathKey("default_work_seed", func(c *Config) *string { return &c.DefaultWorkSeed }),
	pathKey("default_base_rootfs", func(c *Config) *string { return &c.DefaultBaseRootfs }),
	pathKey("default_kernel", func(c *Config) *string { return &c.DefaultKernel }),
	pathKey("default_initrd", func(c *Config) *string { return &c.DefaultInitrd }),
	pathKey("default_modules_dir", func(c *Config) *string { return &c.DefaultModulesDir }),
	pathKey("default_packages_file", func(c *Config) *string { return &c.DefaultPackagesFile }),
	sourceKey("mise_source", func(c *Config) *string { return &c.MiseSource }),
	sourceKey("opencode_source", func(c *Config) *string { return &c.OpencodeSource }),
	sourceKey("tmux_resurrect_source", func(c *Config) *string { return &c.TmuxResurrectSource }),
	sourceKey("tmux_continuum_source", func(c *Config) *string { return &c.TmuxContinuumSource }),
	{"dns_listen_addr",
		func(c *Config, _ loader, v any) error {
			s, ok := v.(string)
			if _, err := netip.ParseAddrPort(s); !ok || s != "" && err != nil {
				return notA(v, `an IP address and a port, such as "127.0.0.1:42069", or "" for no DNS server`)
			}
			c.DNSListenAddr = s
			return nil
		},
		func(c Config) string { return c.DNSListenAddr }},
	{"metrics_listen_addr",
		func(c *Config, _ loader, v any) error {
			s, ok := v.(string)
			if _, err := netip.ParseAddrPort(s); !ok || s != "" && err != nil {
				return notA(v, `an IP address and a port, such as "127.0.0.1:9469", or "" for none`)
			}
			c.MetricsListenAddr = s
			return nil
		},
		func(c Config) string { return c.MetricsListenAddr }},
	{"vmm",
		func(c *Config, _ loader, v any) error {
			s, ok := v.(string)
			if !ok || !slices.Contains([]string{VMMAuto, VMMFirecracker, VMMQEMU}, s) {
				return notA(v, "one of auto, firecracker, qemu")
			}
			c.VMM = s
			return nil
		},
		func(c Config) string { return c.VMM }},
	{"jailer",
		func(c *Config, _ loader, v any) error {
			s, ok := v.(string)
			if !ok || !slices.Contains([]string{JailerAuto, JailerOn, JailerOff}, s) {
				return notA(v, "one of auto, on, off")
			}
			c.Jailer = s
			return nil
		},
		func(c Config) string { return c.Jailer }},
	intKey("default_vcpu", vm.MinVCPU, vm.MaxVCPU, func(c *Config) *int { return &c.DefaultVCPU }),
	{"default_memory",
		func(c *Config, _ loader, v any) error {
			mib, err := vm.ParseMemory("default_memory", fmt.Sprint(v))
			if err != nil {
				return err
			}
			if mib < vm.MinMemoryMiB || mib > vm.MaxMemoryMiB {
				return notA(v, fmt.Sprintf("between %d and %d MiB", vm.MinMemoryMiB, vm.MaxMemoryMiB))
			}
			c.DefaultMemoryMiB = mib
			return nil
		},
		func(c Config) string { return vm.FormatSize(c.DefaultMemoryMiB * vm.MiB) }},
	diskKey("default_disk_size", func(c *Config) *int64 { return &c.DefaultDiskSize }),
	diskKey("default_system_size", func(c *Config) *int64 { return &c.DefaultSystemSize }),
	{"network",
		func(c *Config, _ loader, v any) error {
			s, ok := v.(string)
			if !ok || !slices.Contains([]string{NetworkAuto, NetworkBridge, NetworkUser, NetworkNone}, s) {
				return notA(v, "one of auto, bridge, user, none")
			}
			c.Network = s
			return nil
		},
		func(c Config) string { return c.Network }},
	{"bridge_name",
		func(c *Config, _ loader, v any) error {
			s, ok := v.(string)
			if !ok || !validBridgeName(s) {
				return notA(v, "a name of 1 to 15 letters, digits, dots, hyphens and underscores, with a letter first")
			}
			c.BridgeName = s
			return nil
		},
		func(c Config) string { return c.BridgeName }},
	{"cidr",
		func(c *Config, _ loader, v any) error {
			p, err := prefix(v)
			if err != nil || !p.Addr().Is4() || p.Bits() < 16 || p.Bits() > 29 || !p.Addr().IsGlobalUnicast() {
				return notA(v, `an IPv4 range of 8 to 65536 addresses, such as "172.16.88.0/24"`)
			}
			if p != p.Masked() {
				return notA(v, fmt.Sprintf("%q: a range begins with its first address", p.Masked()))
			}
			c.CIDR = p
			return nil
		},
		func(c Config) string { return c.CIDR.String() }},
	{"ipv6_cidr",
		func(c *Config, _ loader, v any) error {
			if v != IPv6Auto && v != IPv6None {
				p, err := prefix(v)
				if err != nil || p.Bits() != 64 || p != p.Masked() || !p.Addr().IsPrivate() || !p.Addr().Is6() {
					return notA(v, `auto, none, or a unique local range of 64 bits (RFC 4193) such as "fd12:3456:789a::/64"`)
				}
				v = p.String()
			}
			c.IPv6CIDR = v.(string)
			return nil
		},
		func(c Config) string { return c.IPv6CIDR }},
	{"default_nat",
		func(c *Config, _ loader, v any) error {
			b, ok := v.(bool)
			if !ok {
				return notA(v, "true or false, without quotes")
			}
			c.DefaultNAT = b
			return nil
		},
		func(c Config) string { return strconv.FormatBool(c.DefaultNAT) }},
	{"default_network_group",
		func(c *Config, _ loader, v any) error {
			s, ok := v.(string)
			if !ok {
				return notA(v, "the name of a group, in quotes")
			}
			if err := vm.ValidateNetworkGroup(s); err != nil {
				return notA(v, "made of a-z, 0-9 and hyphens, at most 63, with a letter or digit at both ends")
			}
			c.DefaultNetworkGroup = s
			return nil
		},
		func(c Config) string { return c.DefaultNetworkGroup }},
	{"host_ports",
		func(c *Config, _ loader, v any) error {
			p, err := parsePorts(fmt.Sprint(v))
			if err != nil || len(p) > network.MaxHostPorts {
				return notA(v, fmt.Sprintf("ports and ranges of them, such as \"5432,11434\", %d at most", network.MaxHostPorts))
			}
			c.HostPorts = p
			return nil
		},
		func(c Config) string { return c.HostPorts.String() }},
	{"published_ports",
		func(c *Config, _ loader, v any) error {
			if v == PortsAuto {
				c.PublishedPorts = nil
				return nil
			}
			p, err := parsePorts(fmt.Sprint(v))
			if err != nil {
				return notA(v, fmt.Sprintf("ports and ranges of them, such as \"80,3000-3010\", %d at most, or %q", maxPorts, PortsAuto))
			}
			c.PublishedPorts = p
			return nil
		},
		func(c Config) string { return c.PublishedPorts.String() }},
	durationKey("boot_timeout", func(c *Config) *time.Duration { return &c.BootTimeout }),
	durationKey("stop_timeout", func(c *Config) *time.Duration { return &c.StopTimeout }),
	{"ssh_reminder",
		func(c *Config, _ loader, v any) error {
			on, ok := v.(bool)
			if !ok {
				return notA(v, "true or false")
			}
			c.SSHReminder = on
			return nil
		},
		func(c Config) string { return fmt.Sprint(c.SSHReminder) }},
}

// retired are keys of earlier versions and what replaced them.
var retired = map[string]string{
	"ssh_key_path":     "banger makes its own key, id_ed25519 in the runtime bundle, and host keys for each VM",
	"mapdns_bin":       "the daemon answers DNS for .vm itself",
	"mapdns_data_file": "the daemon answers DNS for .vm itself, from its own records",
}

// Defaults for a host with so many CPUs and so much memory. A sandbox that runs a compiler and
// Docker wants 2 GiB; memory that a guest has not touched costs the host nothing.
func Defaults(h vm.Host) Config {
	c := Config{
		LogLevel:          slog.LevelInfo,
		TapPoolSize:       4,
		DNSListenAddr:     "127.0.0.1:42069",
		VMM:               VMMAuto,
		DefaultVCPU:       2,
		DefaultMemoryMiB:  2048,
		DefaultDiskSize:   8 * vm.GiB,
		DefaultSystemSize: 16 * vm.GiB,
		Jailer:            JailerAuto,
		Network:           NetworkAuto,
		BridgeName:        "banger0",
		HostPorts:         Ports{},
		CIDR:              netip.MustParsePrefix("172.16.88.0/24"), // outside of what Docker takes by itself
		IPv6CIDR:          IPv6Auto,
		// A guest under emulation on a busy host needs up to 30 s to sshd (docs/benchmarks.md has
		// today's figure); a hang is told apart with a wide margin.
		BootTimeout: 3 * time.Minute,
		StopTimeout: 90 * time.Second, // systemd's own DefaultTimeoutStopSec, systemd-system.conf(5)
		SSHReminder: true,
	}
	if h.CPUs > 0 {
		c.DefaultVCPU = min(c.DefaultVCPU, h.CPUs)
	}
	if h.MemoryMiB > 0 { // leave half to the host
		c.DefaultMemoryMiB = max(vm.MinMemoryMiB, min(c.DefaultMemoryMiB, h.MemoryMiB/2))
	}
	return c
}

// Host measures this machine: CPUs this process may use, and all its memory.
func Host() vm.Host {
	h := vm.Host{CPUs: runtime.NumCPU()}
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil { // cannot fail with a valid pointer; 0 would mean unknown
		h.MemoryMiB = int64(si.Totalram * uint64(si.Unit) >> 20)
	}
	return h
}

// loader knows what values are relative to.
type loader struct {
	dir  string // of the config file
	home string
}

// Load reads the config file of p, then the environment, which wins. A missing file is fine unless
// BANGER_CONFIG names it. Warnings are for people, one sentence each. Errors are fault.Invalid
// with file, line and column in the subject, and fault.Permission where the file cannot be read.
func Load(e Environment, p Paths, h vm.Host) (Config, []string, error) {
	c := Defaults(h)
	data, err := os.ReadFile(p.ConfigFile)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !p.configRequired:
	case errors.Is(err, fs.ErrNotExist):
		return Config{}, nil, fault.Wrap(err, fault.NotFound, p.ConfigFile, "BANGER_CONFIG names it").
			WithHint("make the file, or unset BANGER_CONFIG")
	case errors.Is(err, fs.ErrPermission):
		return Config{}, nil, fault.Wrap(err, fault.Permission, p.ConfigFile, "cannot be read").WithHint("check it: ls -l %s", p.ConfigFile)
	case err != nil:
		return Config{}, nil, fault.Wrap(err, fault.Invalid, p.ConfigFile, "cannot be read")
	}
	warnings, err := c.parse(data, p.ConfigFile, loader{dir: filepath.Dir(p.ConfigFile), home: e.Home})
	if err != nil {
		return Config{}, nil, err
	}
	if v := e.Getenv("BANGER_LOG_LEVEL"); v != "" {
		if err := setLevel(&c.LogLevel, v); err != nil {
			return Config{}, nil, fault.New(fault.Invalid, "BANGER_LOG_LEVEL", "%s", err).WithHint("export BANGER_LOG_LEVEL=info")
		}
	}
	if v := e.Getenv("BANGER_RUNTIME_DIR"); v != "" {
		abs, err := filepath.Abs(v)
		if err != nil {
			return Config{}, nil, fault.Wrap(err, fault.Invalid, "BANGER_RUNTIME_DIR", "%q has no absolute path", v)
		}
		c.RuntimeDir = abs
	}
	return c, warnings, nil
}

// parse sets what data says. Keys are looked at one by one, since every error is to name its place.
func (c *Config) parse(data []byte, file string, l loader) (warnings []string, err error) {
	at := func(line, column int) string { return fmt.Sprintf("%s:%d:%d", file, line, column) }
	var values map[string]any
	if err := toml.Unmarshal(data, &values); err != nil {
		var de *toml.DecodeError
		if errors.As(err, &de) {
			return nil, fault.New(fault.Invalid, at(de.Position()), "%s", strings.TrimPrefix(de.Error(), "toml: ")).
				WithHint("the line is:\n%s", de.String())
		}
		return nil, fault.Wrap(err, fault.Invalid, file, "is not TOML").WithHint("docs/configuration.md shows an example")
	}
	var p unstable.Parser
	p.Reset(data)
	for p.NextExpression() {
		node := p.Expression()
		it := node.Key()
		if !it.Next() {
			continue // a comment
		}
		first := it.Node()
		start := p.Shape(first.Raw).Start
		name, place := string(first.Data), at(start.Line, start.Column)
		if why, ok := retired[name]; ok {
			warnings = append(warnings, fmt.Sprintf("%s: %s is no longer used: %s", place, name, why))
			continue
		}
		i := slices.IndexFunc(keys, func(k key) bool { return k.name == name })
		switch {
		case node.Kind == unstable.Table || node.Kind == unstable.ArrayTable:
			return nil, fault.New(fault.Invalid, place, "there is no table [%s]; all keys stand at the top", name).
				WithHint("remove the line [%s]", name)
		case i < 0:
			return nil, fault.New(fault.Invalid, place, "there is no key %q", name).WithHint("%s", didYouMean(name))
		}
		if err := keys[i].set(c, l, values[name]); err != nil {
			f := fault.New(fault.Invalid, place, "%s %s", name, strings.TrimPrefix(err.Error(), name+": "))
			if hint := fault.HintOf(err); hint != "" {
				return nil, f.WithHint("%s", hint)
			}
			return nil, f.WithHint("docs/configuration.md explains %s", name)
		}
	}
	if err := p.Error(); err != nil { // Unmarshal has read it all before: cannot happen
		return nil, fault.Wrap(err, fault.Internal, file, "was read once but not twice")
	}
	return warnings, nil
}

func didYouMean(name string) string {
	best, distance := "", min(4, len(name)/2+1) // further than that is another word
	for _, k := range keys {
		if d := spelling.Distance(strings.ToLower(strings.ReplaceAll(name, "-", "_")), k.name); d < distance {
			best, distance = k.name, d
		}
	}
	if best == "" {
		return "docs/configuration.md lists the keys"
	}
	return fmt.Sprintf("did you mean %s?", best)
}

func notA(v any, allowed string) error {
	if s, ok := v.(string); ok {
		return fmt.Errorf("is %q; it must be %s", s, allowed)
	}
	return fmt.Errorf("is %v; it must be %s", v, allowed)
}

func setLevel(to *slog.Level, v any) error {
	s, _ := v.(string)
	switch strings.ToLower(s) {
	case "debug":
		*to = slog.LevelDebug
	case "info":
		*to = slog.LevelInfo
	case "warn":
		*to = slog.LevelWarn
	case "error":
		*to = slog.LevelError
	default:
		return notA(v, "one of debug, info, warn, error")
	}
	return nil
}

func intKey(name string, low, high int, field func(*Config) *int) key {
	return key{name,
		func(c *Config, _ loader, v any) error {
			n, ok := v.(int64)
			if !ok || n < int64(low) || n > int64(high) {
				return notA(v, fmt.Sprintf("a number between %d and %d", low, high))
			}
			*field(c) = int(n)
			return nil
		},
		func(c Config) string { return fmt.Sprint(*field(&c)) }}
}

func prefix(v any) (netip.Prefix, error) {
	s, _ := v.(string)
	return netip.ParsePrefix(s)
}

// validBridgeName takes what every tool that names network devices does (IFNAMSIZ has 16 bytes).
func validBridgeName(s string) bool {
	if len(s) < 1 || len(s) > 15 {
		return false
	}
	for i, c := range []byte(s) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		other := c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_'
		if !letter && (i == 0 || !other) {
			return false
		}
	}
	return true
}

func pathKey(name string, field func(*Config) *string) key {
	return key{name,
		func(c *Config, l loader, v any) error {
			s, ok := v.(string)
			if !ok || strings.ContainsRune(s, 0) {
				return notA(v, "a path, in quotes")
			}
			path, err := l.expand(s)
			*field(c) = path
			return err
		},
		func(c Config) string { return *field(&c) }}
}

// programKey is a pathKey whose value without a slash is a name to be looked up in PATH.
func programKey(name string, field func(*Config) *string) key {
	k := pathKey(name, field)
	set := k.set
	k.set = func(c *Config, l loader, v any) error {
		if s, ok := v.(string); ok && s != "" && s != "~" && !strings.ContainsAny(s, "/\x00") {
			*field(c) = s
			return nil
		}
		return set(c, l, v)
	}
	return k
}

// sourceKey is a place to fetch something from: what has no scheme is a path, up to the # of its pin.
func sourceKey(name string, field func(*Config) *string) key {
	return key{name,
		func(c *Config, l loader, v any) error {
			s, ok := v.(string)
			if !ok || strings.ContainsAny(s, "\x00\n") {
				return notA(v, "a place to fetch from, in quotes: npm:, https:// or git+https:// with a pin, or a path")
			}
			at, pin, pinned := strings.Cut(s, "#")
			if s != "" && !strings.Contains(at, ":") {
				path, err := l.expand(at)
				if err != nil {
					return err
				}
				if s = path; pinned {
					s += "#" + pin
				}
			}
			*field(c) = s
			return nil
		},
		func(c Config) string { return *field(&c) }}
}

// expand makes a path absolute: ~ is the user's home, anything relative starts at the config file.
func (l loader) expand(s string) (string, error) {
	switch {
	case s == "": // as if the key were absent
		return "", nil
	case filepath.IsAbs(s):
		return filepath.Clean(s), nil
	case s == "~" || strings.HasPrefix(s, "~/"):
		if l.home == "" {
			return "", fmt.Errorf("is %q, but there is no home directory", s)
		}
		return filepath.Join(l.home, s[1:]), nil
	case s[0] == '~':
		return "", fmt.Errorf("is %q; only ~ and ~/... are understood", s)
	}
	return filepath.Join(l.dir, s), nil
}

func diskKey(name string, field func(*Config) *int64) key {
	return key{name,
		func(c *Config, _ loader, v any) error {
			n, err := vm.ParseDiskSize(name, fmt.Sprint(v))
			if err != nil {
				return err
			}
			if err := vm.ValidateDiskSize(name, n); err != nil {
				return err
			}
			*field(c) = n
			return nil
		},
		func(c Config) string { return vm.FormatSize(*field(&c)) }}
}

// Timeouts below a second fail on any host, and above a day nobody waits.
func durationKey(name string, field func(*Config) *time.Duration) key {
	return key{name,
		func(c *Config, _ loader, v any) error {
			const allowed = `a time between "1s" and "24h", such as "90s" or "3m"`
			var d time.Duration
			switch v := v.(type) {
			case string:
				var err error
				if d, err = time.ParseDuration(v); err != nil {
					return notA(v, allowed)
				}
			case int64: // seconds, as in most tools
				if v > math.MaxInt32 || v < 0 {
					return notA(v, allowed)
				}
				d = time.Duration(v) * time.Second
			default:
				return notA(v, allowed)
			}
			if d < time.Second || d > 24*time.Hour {
				return notA(v, allowed)
			}
			*field(c) = d
			return nil
		},
		func(c Config) string { return shortDuration(*field(&c)) }}
}

// shortDuration drops the zero units that Duration.String appends to whole minutes and hours.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
