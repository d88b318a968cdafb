package server

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// stamp leaves a time that is not set out of the message.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func stampPtr(t *time.Time) *timestamppb.Timestamp {
	if t == nil {
		return nil
	}
	return stamp(*t)
}

// vmMessage never carries a VM's secrets: they have no field in the schema.
func vmMessage(v vm.VM) *bangerv1.VM {
	m := &bangerv1.VM{
		Id: string(v.ID), Name: v.Name, State: string(v.State), Desired: string(v.Desired),
		Image: v.Pins.Image, ImageId: v.Pins.ImageID,
		Vcpu: int32(v.Spec.VCPU), MemoryMib: v.Spec.MemoryMiB,
		DiskBytes: v.Spec.DiskSize, SystemBytes: v.Spec.SystemSize, Labels: v.Spec.Labels,
		CreatedAt: stamp(v.CreatedAt), StartedAt: stampPtr(v.StartedAt), StoppedAt: stampPtr(v.StoppedAt),
		Vmm: v.VMM, Accel: v.Accel, Pid: int32(v.PID), Note: v.Note, Autostart: v.Spec.Autostart,
		Nat: v.Spec.NAT, NetworkGroup: v.Spec.NetworkGroup,
	}
	if i := v.Interface; i != nil {
		m.Network, m.Address = i.Kind, i.IPv4.Addr().String()
	}
	for _, s := range v.Boot {
		m.Boot = append(m.Boot, &bangerv1.Stage{Name: s.Name, AtMs: s.AtMS})
	}
	if f := v.Failure; f != nil {
		m.Failure = &bangerv1.Failure{
			Step:  f.Step,
			Fault: &bangerv1.Fault{Code: f.Code, Subject: v.Name, Message: f.Message, Hint: f.Hint},
			At:    stamp(f.At),
		}
	}
	return m
}

func detailMessage(d sandbox.Detail) *bangerv1.VM {
	m := vmMessage(d.VM)
	m.Kernel = d.KernelVersion
	m.DiskAllocatedBytes = d.DiskAllocated
	m.SystemAllocatedBytes = d.SystemAllocated
	m.Directory = d.Directory
	m.Log = d.Log
	m.VmmState = d.VMMState
	m.Agent = d.Agent
	for _, a := range d.Addresses {
		m.HostAddresses = append(m.HostAddresses, a.String())
	}
	if c := d.Confinement; c != nil {
		m.Confinement = &bangerv1.Confinement{
			Uid: int32(c.UID), NoNewPrivileges: c.NoNewPrivs, Seccomp: c.Seccomp,
			Cgroup: c.Cgroup, NoCgroup: c.NoCgroup,
			MemoryMaxBytes: c.Limits.Memory, CpuMax: c.Limits.CPUs, TasksMax: c.Limits.Tasks,
			Jailed: c.Jailed, NoJail: c.NoJail,
		}
	}
	return m
}

func vmMessages(list []vm.VM) []*bangerv1.VM {
	out := make([]*bangerv1.VM, len(list))
	for i := range list {
		out[i] = vmMessage(list[i])
	}
	return out
}

// operationMessage leaves the VM out: only the handlers know whether it is worth a look.
func operationMessage(op operation.Operation) *bangerv1.Operation {
	m := &bangerv1.Operation{
		Id: op.ID, Kind: string(op.Kind), VmId: op.VMID, VmName: op.VMName, State: string(op.State),
		CreatedAt: stamp(op.CreatedAt), FinishedAt: stamp(op.FinishedAt), Notices: op.Notices, Image: op.Image,
	}
	for _, s := range op.Stages {
		m.Stages = append(m.Stages, &bangerv1.OperationStage{
			Name: s.Name, Detail: s.Detail, StartedAt: stamp(s.StartedAt), FinishedAt: stamp(s.FinishedAt),
		})
	}
	if op.Fault != nil {
		m.Fault = FaultMessage(op.Fault)
	}
	return m
}

func operationMessages(list []operation.Operation) []*bangerv1.Operation {
	out := make([]*bangerv1.Operation, len(list))
	for i := range list {
		out[i] = operationMessage(list[i])
	}
	return out
}

func findingMessages(list []doctor.Finding) []*bangerv1.Finding {
	out := make([]*bangerv1.Finding, len(list))
	for i, f := range list {
		out[i] = &bangerv1.Finding{Code: f.Code, Severity: string(f.Severity), Title: f.Title, Detail: f.Detail, Fix: f.Fix,
			Fixable: f.Repair != nil, Fixed: f.Fixed}
	}
	return out
}

func eventMessage(e sandbox.Event, byDefault string) *bangerv1.WatchResponse {
	switch {
	case e.Snapshot != nil:
		return &bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Snapshot{Snapshot: &bangerv1.Snapshot{
			Vms:        vmMessages(e.Snapshot.VMs),
			Operations: operationMessages(e.Snapshot.Operations),
			Images:     imageMessages(e.Snapshot.Images, byDefault),
		}}}
	case e.VM != nil:
		return &bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Vm{Vm: vmMessage(*e.VM)}}
	case e.Images != nil:
		return &bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Images{Images: &bangerv1.ImageList{Images: imageMessages(*e.Images, byDefault)}}}
	case e.Operation != nil:
		return &bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Operation{Operation: operationMessage(*e.Operation)}}
	}
	return &bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_VmDeleted{VmDeleted: string(e.Deleted)}}
}
