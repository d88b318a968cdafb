package cli

import (
	"testing"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
)

func TestConfinementText(t *testing.T) {
	for _, c := range []struct {
		in   *bangerv1.Confinement
		want string
	}{
		{nil, ""},
		{&bangerv1.Confinement{Uid: 1000, NoNewPrivileges: true, Seccomp: "filter", Cgroup: "banger-x.scope", MemoryMaxBytes: 1296 << 20, CpuMax: 3, TasksMax: 258},
			"user 1000, no new privileges, seccomp filter, cgroup banger-x.scope (memory 1.3 GiB, 3 CPUs, 258 tasks)"},
		{&bangerv1.Confinement{Uid: 2100000042, Jailed: true, NoNewPrivileges: true, Seccomp: "filter", Cgroup: "banger-x"},
			"user 2100000042, in a jail, no new privileges, seccomp filter, cgroup banger-x (without bounds)"},
		{&bangerv1.Confinement{Uid: 1000, NoJail: "it takes root", NoNewPrivileges: true, Seccomp: "filter", Cgroup: "banger-x"},
			"user 1000, no jail: it takes root, no new privileges, seccomp filter, cgroup banger-x (without bounds)"},
		{&bangerv1.Confinement{NoCgroup: "this host has no cgroup v2"}, "user 0, may gain privileges, no seccomp, no cgroup: this host has no cgroup v2"},
		{&bangerv1.Confinement{NoNewPrivileges: true, Seccomp: "filter", Cgroup: "banger-x", CpuMax: 2.5}, "user 0, no new privileges, seccomp filter, cgroup banger-x (2.5 CPUs)"},
		{&bangerv1.Confinement{NoNewPrivileges: true, Seccomp: "filter", Cgroup: "banger-x"}, "user 0, no new privileges, seccomp filter, cgroup banger-x (without bounds)"},
	} {
		if got := confinementText(c.in); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
