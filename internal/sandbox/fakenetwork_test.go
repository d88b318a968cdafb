package sandbox

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// fakeNetwork is a network whose VMs are files of a directory, named by the VM, that say what is allowed. It outlives the
// daemon, as a real one does.
type fakeNetwork struct {
	dir    string
	host   NetworkHost
	broken *error // of Apply and Attach, if set
}

func fakeNetworks(dir string) func(NetworkHost) []Network {
	return func(h NetworkHost) []Network { return []Network{&fakeNetwork{dir: dir, host: h}} }
}

func (f *fakeNetwork) Kind() string { return vm.BridgeNetwork }

func (f *fakeNetwork) path(id vm.ID) string { return filepath.Join(f.dir, string(id)) }

func (f *fakeNetwork) Restore(_ context.Context, vms []vm.VM) error {
	have, err := names(f.dir)
	for _, n := range have {
		if !slices.ContainsFunc(vms, func(v vm.VM) bool { return string(v.ID) == n }) {
			err = errors.Join(err, os.Remove(filepath.Join(f.dir, n)))
		}
	}
	return err
}

func (f *fakeNetwork) Attach(ctx context.Context, v vm.VM) (vm.Interface, error) {
	i, err := network.Plan{Installation: f.host.Installation, IPv4: netip.MustParsePrefix("10.77.0.0/24")}.Interface(v.Lease.Slot, 1500)
	if err != nil {
		return i, err
	}
	if !exists(f.host.RunDir(v.ID)) {
		return i, errors.New("there is no run directory")
	}
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return i, err
	}
	if err := os.WriteFile(f.path(v.ID), nil, 0o600); err != nil {
		return i, err
	}
	return i, f.Apply(ctx, v)
}

func (f *fakeNetwork) Apply(_ context.Context, v vm.VM) error {
	if f.broken != nil && *f.broken != nil {
		return *f.broken
	}
	if !exists(f.path(v.ID)) {
		return errors.New("the VM is not on the network")
	}
	says := "nat off"
	if v.Spec.NAT {
		says = "nat on"
	}
	if v.Spec.NetworkGroup != "" {
		says += " " + v.Spec.NetworkGroup
	}
	if have, err := os.ReadFile(f.path(v.ID)); err != nil || string(have) == says {
		return err // what is set already is not set again
	}
	return os.WriteFile(f.path(v.ID), []byte(says), 0o600)
}

func (f *fakeNetwork) Detach(_ context.Context, v vm.VM) error {
	if err := os.Remove(f.path(v.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (f *fakeNetwork) Addresses(v vm.VM) []netip.Addr { return []netip.Addr{v.Interface.IPv4.Addr()} }

func (f *fakeNetwork) Check(context.Context) []doctor.Finding {
	out := []doctor.Finding{{Code: "network", Severity: doctor.Pass, Title: "Network of VMs", Detail: "fake"}}
	if exists(f.dir + ".firewall") {
		out = append(out, doctor.Finding{Code: doctor.Firewall, Severity: doctor.Warn, Detail: "it drops", Fix: "open it"})
	}
	return out
}

func (f *fakeNetwork) Close(context.Context) error { return nil }
