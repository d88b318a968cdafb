package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

var host = vm.Host{CPUs: 8, MemoryMiB: 16384}

// load writes content as config.toml and loads it with the environment given as pairs.
func load(t *testing.T, content string, env ...string) (Config, []string, error) {
	t.Helper()
	home := t.TempDir()
	vars := map[string]string{}
	for i := 0; i < len(env); i += 2 {
		vars[env[i]] = env[i+1]
	}
	e := Environment{Getenv: func(k string) string { return vars[k] }, Home: home, UID: os.Getuid(), Tmp: filepath.Join(home, "tmp")}
	p, err := ResolvePaths(e)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(p.ConfigFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.ConfigFile, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(e, p, host)
}

// Each key has a case here: TestEveryKeyIsTestedAndDocumented counts them.
var keyCases = []struct {
	key, toml string
	get       func(Config) any
	want      any
}{
	{"log_level", `"DEBUG"`, func(c Config) any { return c.LogLevel }, slog.LevelDebug},
	{"runtime_dir", `"/opt/bundle/"`, func(c Config) any { return c.RuntimeDir }, "/opt/bundle"},
	{"tap_pool_size", `0`, func(c Config) any { return c.TapPoolSize }, 0},
	{"firecracker_bin", `"firecracker-v1.12"`, func(c Config) any { return c.FirecrackerBin }, "firecracker-v1.12"},
	{"namegen_path", `"~/bin/name"`, func(c Config) any { return c.NamegenPath }, "HOME/bin/name"},
	{"customize_script", `"customize.sh"`, func(c Config) any { return c.CustomizeScript }, "HOME/.config/banger/customize.sh"},
	{"vsock_agent_path", `"../agent"`, func(c Config) any { return c.VsockAgentPath }, "HOME/.config/agent"},
	{"default_rootfs", `"/a/root.ext4"`, func(c Config) any { return c.DefaultRootfs }, "/a/root.ext4"},
	{"default_work_seed", `'~'`, func(c Config) any { return c.DefaultWorkSeed }, "HOME"},
	{"default_base_rootfs", `"/a/base.ext4"`, func(c Config) any { return c.DefaultBaseRootfs }, "/a/base.ext4"},
	{"default_kernel", `"/a/vmlinux"`, func(c Config) any { return c.DefaultKernel }, "/a/vmlinux"},
	{"default_initrd", `"/a/initrd"`, func(c Config) any { return c.DefaultInitrd }, "/a/initrd"},
	{"default_modules_dir", `"/a/modules"`, func(c Config) any { return c.DefaultModulesDir }, "/a/modules"},
	{"default_packages_file", `""`, func(c Config) any { return c.DefaultPackagesFile }, ""},
	{"mise_source", `"../mise#sha256=00"`, func(c Config) any { return c.MiseSource }, "HOME/.config/mise#sha256=00"},
	{"opencode_source", `"npm:opencode@1"`, func(c Config) any { return c.OpencodeSource }, "npm:opencode@1"},
	{"tmux_resurrect_source", `"/a/repository"`, func(c Config) any { return c.TmuxResurrectSource }, "/a/repository"},
	{"tmux_continuum_source", `"git+https://example.org/x#00"`, func(c Config) any { return c.TmuxContinuumSource }, "git+https://example.org/x#00"},
	{"metrics_listen_addr", `"127.0.0.1:9469"`, func(c Config) any { return c.MetricsListenAddr }, "127.0.0.1:9469"},
	{"dns_listen_addr", `"[::1]:53"`, func(c Config) any { return c.DNSListenAddr }, "[::1]:53"},
	{"vmm", `"qemu"`, func(c Config) any { return c.VMM }, VMMQEMU},
	{"default_vcpu", `32`, func(c Config) any { return c.DefaultVCPU }, 32},
	{"default_memory", `4096`, func(c Config) any { return c.DefaultMemoryMiB }, int64(4096)},
	{"default_disk_size", `"1.5G"`, func(c Config) any { return c.DefaultDiskSize }, 1536 * vm.MiB},
	{"default_system_size", `"32GiB"`, func(c Config) any { return c.DefaultSystemSize }, 32 * vm.GiB},
	{"jailer", `"off"`, func(c Config) any { return c.Jailer }, JailerOff},
	{"network", `"none"`, func(c Config) any { return c.Network }, NetworkNone},
	{"bridge_name", `"br-lab"`, func(c Config) any { return c.BridgeName }, "br-lab"},
	{"cidr", `"10.9.8.0/22"`, func(c Config) any { return c.CIDR.String() }, "10.9.8.0/22"},
	{"ipv6_cidr", `"fd12:3456:789A:0::/64"`, func(c Config) any { return c.IPv6CIDR }, "fd12:3456:789a::/64"},
	{"default_nat", `true`, func(c Config) any { return c.DefaultNAT }, true},
	{"default_network_group", `"team-web"`, func(c Config) any { return c.DefaultNetworkGroup }, "team-web"},
	{"host_ports", `"11434,5432"`, func(c Config) any { return c.HostPorts }, Ports{5432, 11434}},
	{"published_ports", `" 3000-3002, 80,3001 "`, func(c Config) any { return c.PublishedPorts }, Ports{80, 3000, 3001, 3002}},
	{"published_ports", `"auto"`, func(c Config) any { return c.PublishedPorts }, Ports(nil)},
	{"published_ports", `""`, func(c Config) any { return c.PublishedPorts }, Ports{}},
	{"boot_timeout", `"90s"`, func(c Config) any { return c.BootTimeout }, 90 * time.Second},
	{"stop_timeout", `45`, func(c Config) any { return c.StopTimeout }, 45 * time.Second},
	{"ssh_reminder", `false`, func(c Config) any { return c.SSHReminder }, false},
}

func TestEachKey(t *testing.T) {
	for _, k := range keyCases {
		t.Run(k.key, func(t *testing.T) {
			content := "# a comment\n" + k.key + " = " + k.toml + "\n"
			c, warnings, err := load(t, content)
			if err != nil || len(warnings) != 0 {
				t.Fatal(err, warnings)
			}
			got := k.get(c)
			if s, ok := got.(string); ok {
				if want := k.want.(string); strings.HasPrefix(want, "HOME") {
					// The temporary home ends in a number; what follows it is the test.
					if _, rest, _ := strings.Cut(s, "/001"); !filepath.IsAbs(s) || rest != strings.TrimPrefix(want, "HOME") {
						t.Errorf("got %q, want %q", s, want)
					}
					return
				}
			}
			if diff := cmp.Diff(k.want, got); diff != "" {
				t.Error(diff)
			}
			// And nothing else changed.
			rest := Defaults(host)
			changed := 0
			for i := range reflect.TypeFor[Config]().NumField() {
				if !reflect.DeepEqual(reflect.ValueOf(rest).Field(i).Interface(), reflect.ValueOf(c).Field(i).Interface()) {
					changed++
				}
			}
			if changed > 1 {
				t.Errorf("%d fields changed", changed)
			}
		})
	}
}

func TestEveryKeyIsTestedAndDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\| ([^|]+) \\| [^|]+ \\|$").FindAllStringSubmatch(string(doc), -1) {
		rows[m[1]] = m[2]
	}
	tested := map[string]bool{}
	for _, k := range keyCases {
		tested[k.key] = true
	}
	defaults := Defaults(host)
	if n := reflect.TypeFor[Config]().NumField(); n != len(keys) {
		t.Errorf("Config has %d fields and there are %d keys", n, len(keys))
	}
	for _, k := range keys {
		if !tested[k.name] {
			t.Errorf("%s has no case in TestEachKey", k.name)
		}
		shown, ok := rows[k.name]
		value := k.show(defaults)
		switch {
		case !ok:
			t.Errorf("%s is not in docs/configuration.md", k.name)
		case value != "" && shown != "`"+value+"`":
			t.Errorf("docs/configuration.md says the default of %s is %s; it is %s", k.name, shown, value)
		case value == "" && strings.HasPrefix(shown, "`") && rows[strings.Trim(shown, "`")] == "":
			t.Errorf("docs/configuration.md says the default of %s is %s; it has none", k.name, shown)
		}
		// What is shown can be typed.
		quoted := value
		if strings.Trim(value, "0123456789") != "" && value != "true" && value != "false" || value == "" {
			quoted = `"` + value + `"`
		}
		if _, _, err := load(t, k.name+" = "+quoted); err != nil {
			t.Errorf("the default of %s is refused: %v", k.name, err)
		}
	}
	for name := range rows {
		known := tested[name]
		if !known {
			t.Errorf("docs/configuration.md has the key %s, which does not exist", name)
		}
	}
	for name := range retired {
		if !strings.Contains(string(doc), "`"+name+"`") {
			t.Errorf("docs/configuration.md does not say that %s is retired", name)
		}
	}
}

func TestMistakesNamePlaceAndRemedy(t *testing.T) {
	for name, c := range map[string]struct{ content, place, message, hint string }{
		"typo":              {"\n\nlog_levl = 'info'\n", ":3:1", `no key "log_levl"`, "did you mean log_level?"},
		"dashes":            {"default-vcpu = 2", ":1:1", `no key "default-vcpu"`, "did you mean default_vcpu?"},
		"nothing like it":   {"colour = 'red'", ":1:1", `"colour"`, "configuration.md"},
		"table":             {"vmm = 'qemu'\n[network]\nx = 1\n", ":2:2", "[network]", "remove"},
		"dotted":            {"a.b = 1", ":1:1", `"a"`, "configuration.md"},
		"syntax":            {"vmm = 'qemu'\ndefault_vcpu = = 2\n", ":2:16", "", "default_vcpu = = 2"},
		"twice":             {"default_vcpu = 2\ndefault_vcpu = 3\n", ":2:1", "", "default_vcpu"},
		"unfinished":        {"vmm = 'qemu", ":1:", "", ""},
		"type":              {"  default_vcpu = 'two'", ":1:3", `default_vcpu is "two"`, "default_vcpu"},
		"zero":              {"default_vcpu = 0", ":1:1", "is 0; it must be a number between 1 and 32", ""},
		"float":             {"default_vcpu = 1.5", ":1:1", "is 1.5", ""},
		"pool":              {"tap_pool_size = -1", ":1:1", "is -1; it must be a number between 0 and 250", ""},
		"level":             {"log_level = 'loud'", ":1:1", `is "loud"; it must be one of debug, info, warn, error`, ""},
		"vmm":               {"vmm = 'xen'", ":1:1", "auto, firecracker, qemu", ""},
		"path type":         {"default_kernel = 3", ":1:1", "it must be a path", ""},
		"other's home":      {"default_kernel = '~bob/vmlinux'", ":1:1", "only ~ and ~/", ""},
		"little memory":     {"default_memory = 64", ":1:1", "between 128 and 1048576 MiB", ""},
		"memory type":       {"default_memory = true", ":1:1", `"true" is not a size`, "2G"},
		"disk no unit":      {"default_disk_size = 16", ":1:1", "no unit", "did you mean 16G?"},
		"disk too small":    {"default_disk_size = '1M'", ":1:1", "less than 512M", "16G"},
		"disk too large":    {"default_system_size = '3T'", ":1:1", "more than 2T", "16G"},
		"duration":          {"boot_timeout = 'soon'", ":1:1", `is "soon"; it must be a time`, ""},
		"negative seconds":  {"stop_timeout = -1", ":1:1", "is -1", ""},
		"no time":           {"stop_timeout = '0s'", ":1:1", `is "0s"`, ""},
		"jailer":            {"jailer = true", ":1:1", "one of auto, on, off", ""},
		"network":           {"network = 'tap'", ":1:1", "one of auto, bridge, user, none", ""},
		"long bridge":       {"bridge_name = 'a-bridge-too-far'", ":1:1", "1 to 15", ""},
		"bridge characters": {"bridge_name = 'br/0'", ":1:1", "1 to 15", ""},
		"no cidr":           {"cidr = '172.16.88.1'", ":1:1", "IPv4 range", ""},
		"cidr of IPv6":      {"cidr = 'fd00::/64'", ":1:1", "IPv4 range", ""},
		"cidr inside":       {"cidr = '172.16.88.1/24'", ":1:1", `"172.16.88.0/24": a range begins`, ""},
		"cidr too small":    {"cidr = '172.16.88.0/30'", ":1:1", "8 to 65536", ""},
		"cidr of multicast": {"cidr = '224.0.0.0/24'", ":1:1", "IPv4 range", ""},
		"ipv6 in public":    {"ipv6_cidr = '2001:db8::/64'", ":1:1", "unique local", ""},
		"ipv6 length":       {"ipv6_cidr = 'fd00::/48'", ":1:1", "64 bits", ""},
		"ipv6 type":         {"ipv6_cidr = false", ":1:1", "is false", ""},
		"nat":               {"default_nat = 'yes'", ":1:1", "true or false", ""},
		"group":             {"default_network_group = '-a'", ":1:1", "a-z, 0-9", ""},
		"host port":         {"host_ports = 'all'", ":1:1", "it must be ports", ""},
		"many host ports":   {"host_ports = '1-65'", ":1:1", "64 at most", ""},
		"port":              {"published_ports = '80,,81'", ":1:1", "it must be ports", ""},
		"no port":           {"published_ports = 0", ":1:1", "it must be ports", ""},
		"a large port":      {"published_ports = '65536'", ":1:1", "it must be ports", ""},
		"a range back":      {"published_ports = '3010-3000'", ":1:1", "it must be ports", ""},
		"many ports":        {"published_ports = '1-65535'", ":1:1", "1024 at most", ""},
		"metrics name":      {"metrics_listen_addr = 'localhost:9469'", ":1:1", "it must be an IP address and a port", ""},
		"DNS name":          {"dns_listen_addr = 'localhost:53'", ":1:1", "it must be an IP address and a port", ""},
		"DNS no port":       {"dns_listen_addr = '127.0.0.1'", ":1:1", "it must be an IP address and a port", ""},
		"years":             {"stop_timeout = 999999999999999999", ":1:1", "is 99999", ""},
	} {
		_, _, err := load(t, c.content)
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if hint := fault.HintOf(err); !strings.Contains(err.Error(), "config.toml"+c.place) || !strings.Contains(err.Error(), c.message) ||
			!strings.Contains(hint, c.hint) || hint == "" {
			t.Errorf("%s: %v\nhint: %s\nwant place %s, message %q, hint %q", name, err, hint, c.place, c.message, c.hint)
		}
	}
}

func TestRetiredKeysWarn(t *testing.T) {
	_, w, err := load(t, "ssh_key_path = '/x'\nmapdns_bin = 3\nmapdns_data_file = ''\nvmm = 'qemu'\n")
	if err != nil || len(w) != 3 || !strings.Contains(w[0], "config.toml:1:1: ssh_key_path") || !strings.Contains(w[1], "DNS") {
		t.Errorf("%v, %q", err, w)
	}
}

func TestEnvironmentWins(t *testing.T) {
	c, _, err := load(t, "log_level = 'warn'\nruntime_dir = '/from/file'", "BANGER_LOG_LEVEL", "error", "BANGER_RUNTIME_DIR", "/from/env/")
	if err != nil || c.LogLevel != slog.LevelError || c.RuntimeDir != "/from/env" {
		t.Errorf("%v, %+v", err, c)
	}
	if _, _, err := load(t, "", "BANGER_LOG_LEVEL", "loud"); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "BANGER_LOG_LEVEL") {
		t.Errorf("a wrong level: %v", err)
	}
}

func TestMissingFileIsFineUnlessNamed(t *testing.T) {
	for env, want := range map[string]fault.Code{"": "", "/nonexistent/c.toml": fault.NotFound} {
		e := Environment{Getenv: func(k string) string {
			if k == "BANGER_CONFIG" {
				return env
			}
			return ""
		}, Home: t.TempDir(), Tmp: t.TempDir()}
		p, err := ResolvePaths(e)
		if err != nil {
			t.Fatal(err)
		}
		c, _, err := Load(e, p, host)
		if fault.CodeOf(err) != want {
			t.Errorf("%q: %v", env, err)
		}
		if want == "" && !reflect.DeepEqual(c, Defaults(host)) {
			t.Errorf("without a file: %+v", c)
		}
	}
}

func TestDefaultsFitTheHost(t *testing.T) {
	c := Defaults(vm.Host{CPUs: 1, MemoryMiB: 1024})
	if c.DefaultVCPU != 1 || c.DefaultMemoryMiB != 512 {
		t.Errorf("on a small host: %+v", c)
	}
	h := Host()
	if h.CPUs < 1 || h.MemoryMiB < 64 {
		t.Errorf("this host: %+v", h)
	}
	c = Defaults(h)
	if err := (vm.Spec{VCPU: c.DefaultVCPU, MemoryMiB: c.DefaultMemoryMiB, DiskSize: c.DefaultDiskSize, SystemSize: c.DefaultSystemSize}).Validate(h); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
}

// Whatever the file holds, reading it ends with settings or with an error for people.
func FuzzParse(f *testing.F) {
	for _, k := range keyCases {
		f.Add(k.key + " = " + k.toml)
	}
	f.Add("[a]\nb=1")
	f.Add("log_level.x = 1")
	f.Fuzz(func(t *testing.T, s string) {
		c := Defaults(host)
		if _, err := c.parse([]byte(s), "f", loader{dir: "/d", home: "/h"}); err != nil && (!fault.Is(err, fault.Invalid) || fault.HintOf(err) == "") {
			t.Errorf("%q: %v", s, err)
		}
	})
}
