package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxPorts is how many may be published: each costs a descriptor for each VM.
const maxPorts = 1024

// PortsAuto is the setting of published_ports for those that guests listen on.
const PortsAuto = "auto"

// Ports are TCP ports, sorted, each once. Nil stands for PortsAuto.
type Ports []uint16

// parsePorts reads "80,3000-3010". "" is none.
func parsePorts(s string) (Ports, error) {
	out := Ports{}
	for field := range strings.SplitSeq(s, ",") {
		field = strings.TrimSpace(field)
		if field == "" && strings.TrimSpace(s) == "" {
			return out, nil
		}
		first, last, isRange := strings.Cut(field, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.ParseUint(strings.TrimSpace(first), 10, 16)
		if err != nil {
			return nil, err
		}
		to, err := strconv.ParseUint(strings.TrimSpace(last), 10, 16)
		if err != nil {
			return nil, err
		}
		if from == 0 || to < from || len(out)+int(to-from) >= maxPorts {
			return nil, fmt.Errorf("%q is no range of ports, or there are too many", field)
		}
		for p := from; p <= to; p++ {
			out = append(out, uint16(p))
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// String writes them as they are read.
func (p Ports) String() string {
	if p == nil {
		return PortsAuto
	}
	var out []string
	for i := 0; i < len(p); {
		j := i
		for j+1 < len(p) && p[j+1] == p[j]+1 {
			j++
		}
		if j == i {
			out = append(out, fmt.Sprint(p[i]))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", p[i], p[j]))
		}
		i = j + 1
	}
	return strings.Join(out, ",")
}
