package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxPorts is how many may be published: each costs a descriptor for each VM.
const maxPorts = 1024

// Ports are TCP ports, sorted, each once.
type Ports []uint16

// defaultPorts are SSH's and those that servers for development and databases choose by themselves.
func defaultPorts() Ports {
	p, err := parsePorts("22,80,443,1313,3000-3010,4000,4200,4321,5000-5010,5173-5175,5432,6006,6379,8000-8010,8080-8090,8443,8888,9000,9090")
	if err != nil {
		panic(err) // a constant
	}
	return p
}

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
