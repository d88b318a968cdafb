package cli

import (
	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// createFlags are the flags that say what VM is to be made: `vm create` and `vm run` have the same.
type createFlags struct {
	name, image  string
	vcpu         *count
	memory       *size
	disk, system *size
	labelled     labels
	nat          tristate
	group        groupFlag
}

// addCreateFlags declares them on cmd, with the real defaults in their help.
func addCreateFlags(cmd *cobra.Command) *createFlags {
	d := createDefaults()
	c := &createFlags{
		vcpu:     &count{what: "virtual CPUs"},
		memory:   &size{what: "--memory", parse: vm.ParseMemory},
		disk:     &size{what: "--disk-size", parse: vm.ParseDiskSize},
		system:   &size{what: "--system-size", parse: vm.ParseDiskSize},
		labelled: labels{},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.Var((*text)(&c.name), "name", "a-z, 0-9 and hyphens (default a generated one, adjective-animal)")
	f.Var((*text)(&c.image), "image", "image to make it from, as banger image list shows them"+d.image)
	f.Var(c.vcpu, "vcpu", "virtual CPUs"+d.vcpu)
	f.Var(c.memory, "memory", "memory; a number alone is MiB"+d.memory)
	f.Var(c.disk, "disk-size", "work disk, mounted at /root"+d.disk)
	f.Var(c.system, "system-size", "system disk: everything written elsewhere"+d.system)
	f.Var(c.labelled, "label", "label, can be repeated")
	c.nat.add(f, "nat", "let it reach what the host reaches"+d.nat, "keep it from everything outside of the host")
	c.group.add(f, "let it talk to the VMs of this group"+d.group, "let it talk to no other VM")
	return c
}

// request is what the flags ask for.
func (c *createFlags) request(cmd *cobra.Command) (*bangerv1.CreateVMRequest, error) {
	if cmd.Flags().Changed("name") && c.name == "" {
		return nil, usage(cmd, "--name is empty: leave it out to get a name")
	}
	return &bangerv1.CreateVMRequest{
		Name: c.name, Image: c.image, Vcpu: c.vcpu.value, MemoryMib: c.memory.value,
		DiskBytes: c.disk.value, SystemBytes: c.system.value, Labels: c.labelled, Nat: c.nat.value, NetworkGroup: c.group.value,
	}, nil
}
