package kernel

import (
	"bytes"
	"path"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// What host and guest program agree on about the initrd.
const (
	// AgentPath is the guest program in an initrd of our own.
	AgentPath = "init"
	// ForeignAgentPath is the guest program beside a foreign initrd, booted with
	// rdinit=/banger/init.
	ForeignAgentPath = "banger/init"
	// ModulesPath holds the modules, unpacked, under their files' base names.
	ModulesPath = "banger/modules"
	// OrderPath lists the files of ModulesPath in the order to load them, one per line.
	OrderPath = ModulesPath + "/order"
)

// BuildInitrd makes the initrd of a kernel: agent as /init, and the modules it loads. The result is
// not compressed: it is unpacked by the guest's kernel at every boot, and is small. The same
// input gives the same bytes.
func BuildInitrd(agent []byte, modules *Tree) ([]byte, error) {
	mods, err := moduleEntries(modules)
	if err != nil {
		return nil, err
	}
	entries := append(skeleton(), mods...)
	entries = append(entries, entry{name: AgentPath, mode: modeFile | 0o755, content: agent})
	return appendCPIO(make([]byte, 0, cpioSize(entries)), entries), nil
}

// RegenerateInitrd gives an initrd that BuildInitrd made, with another agent: every daemon boots its
// own. It costs two copies, so it may run at every start. What BuildInitrd did not make is fault.Invalid.
func RegenerateInitrd(initrd, agent []byte, subject string) ([]byte, error) {
	entries, err := parseCPIO(initrd, subject)
	if err != nil {
		return nil, err
	}
	if !ownEntries(entries) {
		return nil, fault.New(fault.Invalid, subject, "is not an initrd made by banger")
	}
	for i := range entries {
		if entries[i].name == AgentPath {
			entries[i].content = agent
		}
	}
	return appendCPIO(make([]byte, 0, cpioSize(entries)), entries), nil
}

// IsOwn says whether initrd is one that RegenerateInitrd can renew; any other is a foreign one.
func IsOwn(initrd []byte) bool {
	entries, err := parseCPIO(initrd, "")
	return err == nil && ownEntries(entries)
}

func ownEntries(entries []entry) bool {
	var agent, order bool
	for _, e := range entries {
		agent = agent || e.name == AgentPath
		order = order || e.name == OrderPath
	}
	return agent && order
}

// JoinForeign adds the guest program and the modules of own, an initrd that BuildInitrd made, to an
// initrd that banger did not make, for a boot with rdinit=/banger/init. Ours goes first, uncompressed: the
// kernel reads a plain archive before a compressed one whatever the compression, while behind one in LZ4,
// which has no end mark, it would be lost. An own that BuildInitrd did not make is fault.Invalid.
func JoinForeign(foreign, agent, own []byte, subject string) ([]byte, error) {
	entries, err := parseCPIO(own, subject)
	if err != nil {
		return nil, err
	}
	if !ownEntries(entries) {
		return nil, fault.New(fault.Invalid, subject, "is not an initrd made by banger")
	}
	var ours []entry
	for _, e := range entries {
		if e.name == "banger" || strings.HasPrefix(e.name, "banger/") {
			ours = append(ours, e)
		}
	}
	ours = append(ours, entry{name: ForeignAgentPath, mode: modeFile | 0o755, content: agent})
	b := appendCPIO(make([]byte, 0, cpioSize(ours)+len(foreign)), ours)
	return append(b, foreign...), nil
}

// skeleton is what /init finds before it has mounted anything: the kernel opens /dev/console for it.
func skeleton() []entry {
	return []entry{
		{name: "dev", mode: modeDir | 0o755},
		{name: "dev/console", mode: modeDevice | 0o600, major: 5, minor: 1},
		{name: "dev/null", mode: modeDevice | 0o666, major: 1, minor: 3},
		{name: "dev/kmsg", mode: modeDevice | 0o600, major: 1, minor: 11},
		{name: "proc", mode: modeDir | 0o555},
		{name: "sys", mode: modeDir | 0o555},
		{name: "run", mode: modeDir | 0o755},
		{name: "banger", mode: modeDir | 0o755},
	}
}

// moduleEntries gives the directory of the modules, the modules, and their order: of those that every boot loads, and
// of each of RootModules.
func moduleEntries(modules *Tree) ([]entry, error) {
	files, err := modules.Order(InitrdModules())
	if err != nil {
		return nil, err
	}
	out := []entry{{name: ModulesPath, mode: modeDir | 0o755}}
	carried := map[string]bool{}
	list := func(files []string, orderPath string) error {
		var order bytes.Buffer
		for _, file := range files {
			name, _, _ := strings.Cut(path.Base(file), ".ko")
			name += ".ko"
			order.WriteString(name + "\n")
			if carried[file] {
				continue
			}
			carried[file] = true
			b, err := modules.Read(file)
			if err != nil {
				return err
			}
			out = append(out, entry{name: ModulesPath + "/" + name, mode: modeFile | 0o644, content: b})
		}
		out = append(out, entry{name: orderPath, mode: modeFile | 0o644, content: order.Bytes()})
		return nil
	}
	if err := list(files, OrderPath); err != nil {
		return nil, err
	}
	for _, w := range RootModules() {
		files, err := modules.Order([]Wanted{w})
		if err != nil {
			return nil, err
		}
		if len(files) == 0 { // built in, or not there at all
			continue
		}
		if err := list(files, OrderPath+"-"+w.Name); err != nil {
			return nil, err
		}
	}
	return out, nil
}
