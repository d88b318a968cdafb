package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func (a *app) setCommand() *cobra.Command {
	var (
		vcpu    = &count{what: "virtual CPUs"}
		memory  = &size{what: "--memory", parse: vm.ParseMemory}
		disk    = &size{what: "--disk-size", parse: vm.ParseDiskSize}
		system  = &size{what: "--system-size", parse: vm.ParseDiskSize}
		labels  = &labelChanges{set: labels{}}
		auto    tristate
		nat     tristate
		group   groupFlag
		restart bool
	)
	cmd := &cobra.Command{
		Use: "set VM... FLAGS", Short: "Change the settings of VMs",
		Long: `Change the settings of VMs. For each VM all that is asked is done, or nothing. Disks grow at once, also
of a VM that runs, and never shrink. Memory and virtual CPUs change only while a VM is stopped: with --restart
one that runs is stopped and started.` + refsHelp,
		Example: `  banger vm set calm-otter --memory 4G --vcpu 4 --restart
  banger vm set calm-otter --disk-size 32G
  banger vm set web-1 web-2 --nat
  banger vm set web-1 db-1 --network-group shop
  banger vm set web-1 web-2 --autostart --label team=web --label old-`,
		Args: someRefs,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := &bangerv1.SetVMRequest{Labels: labels.set, DropLabels: labels.drop, Restart: restart, Autostart: auto.value, Nat: nat.value, NetworkGroup: group.value}
			if vcpu.value != 0 {
				r.Vcpu = &vcpu.value
			}
			for field, f := range map[**int64]*size{&r.MemoryMib: memory, &r.DiskBytes: disk, &r.SystemBytes: system} {
				if f.value != 0 {
					*field = &f.value
				}
			}
			if r.Vcpu == nil && r.MemoryMib == nil && r.DiskBytes == nil && r.SystemBytes == nil && r.Autostart == nil && r.Nat == nil && r.NetworkGroup == nil &&
				len(r.Labels) == 0 && len(r.DropLabels) == 0 {
				return usage(cmd, "nothing is to be changed: name a setting")
			}
			return a.batch(cmd, args, "set", func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
				mine := &bangerv1.SetVMRequest{Id: v.GetId(), Vcpu: r.Vcpu, MemoryMib: r.MemoryMib, DiskBytes: r.DiskBytes, SystemBytes: r.SystemBytes,
					Autostart: r.Autostart, Nat: r.Nat, NetworkGroup: r.NetworkGroup, Labels: r.Labels, DropLabels: r.DropLabels, Restart: r.Restart}
				resp, err := c.VMs.SetVM(ctx, mine)
				return resp.GetOperation(), err
			})
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.Var(memory, "memory", "memory; a number alone is MiB (needs a stop)")
	f.Var(vcpu, "vcpu", "virtual CPUs (needs a stop)")
	f.Var(disk, "disk-size", "work disk, mounted at /root; never smaller")
	f.Var(system, "system-size", "system disk: everything written elsewhere; never smaller")
	auto.add(f, "autostart", "start it again after a reboot of the host that it ran in", "leave it stopped after a reboot of the host")
	nat.add(f, "nat", "let it reach what the host reaches, at once", "keep it from everything outside of the host, at once")
	group.add(f, "let it talk to the VMs of this group, at once", "let it talk to no other VM, at once")
	f.Var(labels, "label", "label to set, or with KEY- to take away; can be repeated")
	f.BoolVar(&restart, "restart", false, "stop and start a running VM if the change needs that")
	return cmd
}

// labelChanges is a repeatable flag of key=value pairs to set and of key- to take away.
type labelChanges struct {
	set  labels
	drop []string
}

func (l *labelChanges) String() string { return "" }
func (l *labelChanges) Type() string   { return "KEY=VALUE|KEY-" }
func (l *labelChanges) Set(s string) error {
	key, gone := strings.CutSuffix(s, "-")
	if gone && !strings.Contains(s, "=") {
		if key == "" {
			return fmt.Errorf("%q is no label: write key=value, or key- to take it away", s)
		}
		if _, both := l.set[key]; both {
			return fmt.Errorf("label %q is set and taken away", key)
		}
		l.drop = append(l.drop, key)
		return nil
	}
	if err := l.set.Set(s); err != nil {
		return fmt.Errorf("%q is no label: write key=value, or key- to take it away", s)
	}
	key, _, _ = strings.Cut(s, "=")
	for _, d := range l.drop {
		if d == key {
			return fmt.Errorf("label %q is set and taken away", key)
		}
	}
	return nil
}

// tristate is a pair of flags, --name and --no-name; nil if neither was given.
type tristate struct{ value *bool }

func (t *tristate) add(f *pflag.FlagSet, name, help, noHelp string) {
	for _, half := range []struct {
		name, help string
		means      bool
	}{{name, help, true}, {"no-" + name, noHelp, false}} {
		f.BoolFunc(half.name, half.help, func(s string) error {
			on, err := strconv.ParseBool(s)
			if err != nil {
				return fault.New(fault.Invalid, "--"+half.name, "%q is neither true nor false", s)
			}
			on = on == half.means
			if t.value != nil && *t.value != on {
				return fault.New(fault.Invalid, "--"+name, "is given together with --no-%s", name)
			}
			t.value = &on
			return nil
		})
	}
}
