package server

import (
	"context"

	"connectrpc.com/connect"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

type vmHandler struct {
	svc  Machines
	info Info
}

func (h *vmHandler) CreateVM(ctx context.Context, r *bangerv1.CreateVMRequest) (*bangerv1.CreateVMResponse, error) {
	op, err := h.svc.Create(ctx, sandbox.CreateRequest{
		Name: r.GetName(), Image: r.GetImage(), NoStart: r.GetNoStart(), NAT: r.Nat, NetworkGroup: r.NetworkGroup,
		Spec: vm.Spec{
			VCPU: int(r.GetVcpu()), MemoryMiB: r.GetMemoryMib(),
			DiskSize: r.GetDiskBytes(), SystemSize: r.GetSystemBytes(), Labels: r.GetLabels(),
		},
	})
	if err != nil {
		return nil, err
	}
	return &bangerv1.CreateVMResponse{Operation: operationMessage(op)}, nil
}

func (h *vmHandler) StartVM(ctx context.Context, r *bangerv1.StartVMRequest) (*bangerv1.StartVMResponse, error) {
	op, err := h.svc.Start(ctx, vm.ID(r.GetId()))
	if err != nil {
		return nil, err
	}
	return &bangerv1.StartVMResponse{Operation: operationMessage(op)}, nil
}

func (h *vmHandler) StopVM(ctx context.Context, r *bangerv1.StopVMRequest) (*bangerv1.StopVMResponse, error) {
	var op operation.Operation
	var err error
	switch {
	case r.GetHostShutdown() && r.GetForce():
		err = fault.New(fault.Invalid, "", "force and host_shutdown exclude each other")
	case r.GetHostShutdown():
		op, err = h.svc.PowerOff(ctx, vm.ID(r.GetId()))
	default:
		op, err = h.svc.Stop(ctx, vm.ID(r.GetId()), r.GetForce())
	}
	if err != nil {
		return nil, err
	}
	return &bangerv1.StopVMResponse{Operation: operationMessage(op)}, nil
}

func (h *vmHandler) RestartVM(ctx context.Context, r *bangerv1.RestartVMRequest) (*bangerv1.RestartVMResponse, error) {
	op, err := h.svc.Restart(ctx, vm.ID(r.GetId()))
	if err != nil {
		return nil, err
	}
	return &bangerv1.RestartVMResponse{Operation: operationMessage(op)}, nil
}

func (h *vmHandler) DeleteVM(ctx context.Context, r *bangerv1.DeleteVMRequest) (*bangerv1.DeleteVMResponse, error) {
	op, err := h.svc.Delete(ctx, vm.ID(r.GetId()))
	if err != nil {
		return nil, err
	}
	return &bangerv1.DeleteVMResponse{Operation: operationMessage(op)}, nil
}

func (h *vmHandler) SetVM(ctx context.Context, r *bangerv1.SetVMRequest) (*bangerv1.SetVMResponse, error) {
	change := vm.Change{
		MemoryMiB: r.MemoryMib, DiskSize: r.DiskBytes, SystemSize: r.SystemBytes, Autostart: r.Autostart, NAT: r.Nat, Group: r.NetworkGroup,
		Labels: r.GetLabels(), DropLabels: r.GetDropLabels(),
	}
	if r.Vcpu != nil {
		n := int(r.GetVcpu())
		change.VCPU = &n
	}
	op, err := h.svc.Set(ctx, vm.ID(r.GetId()), sandbox.SetRequest{Change: change, Restart: r.GetRestart()})
	if err != nil {
		return nil, err
	}
	return &bangerv1.SetVMResponse{Operation: operationMessage(op)}, nil
}

func (h *vmHandler) KillVM(ctx context.Context, r *bangerv1.KillVMRequest) (*bangerv1.KillVMResponse, error) {
	v, err := h.svc.Kill(ctx, vm.ID(r.GetId()), int(r.GetSignal()))
	if err != nil {
		return nil, err
	}
	return &bangerv1.KillVMResponse{Vm: vmMessage(v)}, nil
}

func (h *vmHandler) GetVM(ctx context.Context, r *bangerv1.GetVMRequest) (*bangerv1.GetVMResponse, error) {
	d, err := h.svc.Show(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	m := detailMessage(d)
	m.OperationId = h.svc.RunningOperation(d.VM.ID)
	return &bangerv1.GetVMResponse{Vm: m}, nil
}

func (h *vmHandler) ListVMs(ctx context.Context, _ *bangerv1.ListVMsRequest) (*bangerv1.ListVMsResponse, error) {
	list, err := h.svc.List(ctx)
	if err != nil {
		return nil, err
	}
	messages := vmMessages(list)
	for i := range list {
		messages[i].OperationId = h.svc.RunningOperation(list[i].ID)
	}
	return &bangerv1.ListVMsResponse{Vms: messages}, nil
}

func (h *vmHandler) ResolveVMs(ctx context.Context, r *bangerv1.ResolveVMsRequest) (*bangerv1.ResolveVMsResponse, error) {
	resp := &bangerv1.ResolveVMsResponse{}
	for _, ref := range r.GetRefs() {
		result := &bangerv1.ResolvedVM{Ref: ref}
		if v, err := h.svc.Resolve(ctx, ref); err != nil {
			result.Fault = FaultMessage(err)
		} else {
			result.Vm = vmMessage(v)
		}
		resp.Results = append(resp.Results, result)
	}
	return resp, nil
}

func (h *vmHandler) GetDefaults(ctx context.Context, _ *bangerv1.GetDefaultsRequest) (*bangerv1.GetDefaultsResponse, error) {
	d, err := h.svc.Defaults(ctx)
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetDefaultsResponse{
		Image: d.Image, Vcpu: int32(d.Spec.VCPU), MemoryMib: d.Spec.MemoryMiB,
		DiskBytes: d.Spec.DiskSize, SystemBytes: d.Spec.SystemSize, Nat: d.Spec.NAT,
		HostCpus: int32(d.Host.CPUs), HostMemoryMib: d.Host.MemoryMiB,
	}, nil
}

func (h *vmHandler) GetSSHTarget(ctx context.Context, r *bangerv1.GetSSHTargetRequest) (*bangerv1.GetSSHTargetResponse, error) {
	v, err := h.svc.Resolve(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	target, err := h.svc.SSHTarget(ctx, v.ID)
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetSSHTargetResponse{
		User: sandbox.SSHUser, IdentityFile: target.IdentityFile, HostKey: target.HostKey,
		HostKeyAlias: sandbox.HostKeyAlias(v.ID), Remind: target.Remind,
	}, nil
}

func (h *vmHandler) ReadLog(ctx context.Context, r *bangerv1.ReadLogRequest, stream *connect.ServerStream[bangerv1.ReadLogResponse]) error {
	v, err := h.svc.Resolve(ctx, r.GetId())
	if err != nil {
		return err
	}
	request := sandbox.LogRequest{Lines: -1, Follow: r.GetFollow(), VMM: r.GetVmm(), Plain: r.GetPlain()}
	if r.Tail != nil {
		if request.Lines = int(r.GetTail()); request.Lines < 0 {
			return fault.New(fault.Invalid, "", "%d is no number of lines", request.Lines)
		}
	}
	return streamed(ctx, h.info.Ending, func(ctx context.Context) error {
		return h.svc.ReadLog(ctx, v.ID, request, func(b []byte) error {
			return stream.Send(&bangerv1.ReadLogResponse{Data: b})
		})
	})
}

type operationHandler struct {
	svc    Operations
	vms    Machines
	images Images
	ending <-chan struct{}
}

// streamed runs a watch that must end when the daemon does, and then says why it ended.
func streamed(ctx context.Context, ending <-chan struct{}, watch func(context.Context) error) error {
	shuttingDown := fault.New(fault.Unavailable, "", "the daemon is shutting down")
	select {
	case <-ending:
		return shuttingDown
	default:
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-ending:
			cancel()
		case <-done:
		}
	}()
	err := watch(ctx)
	select {
	case <-ending:
		if err != nil {
			return shuttingDown
		}
	default:
	}
	return err
}

// final adds the VM or image as it is to the message of an operation that ended.
func (h *operationHandler) final(ctx context.Context, op operation.Operation) (*bangerv1.Operation, error) {
	m := operationMessage(op)
	if op.State == operation.Running {
		return m, nil
	}
	if op.Image != "" {
		d, err := h.images.Image(ctx, op.Image)
		switch {
		case err == nil:
			m.Made = imageDetailMessage(d)
		case !fault.Is(err, fault.NotFound):
			return nil, err
		}
	}
	v, err := h.vms.Resolve(ctx, op.VMID)
	switch {
	case fault.Is(err, fault.NotFound):
		return m, nil // deleted, or never admitted
	case err != nil:
		return nil, err
	}
	m.Vm = vmMessage(v)
	return m, nil
}

func (h *operationHandler) GetOperation(ctx context.Context, r *bangerv1.GetOperationRequest) (*bangerv1.GetOperationResponse, error) {
	op, err := h.svc.Operation(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	m, err := h.final(ctx, op)
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetOperationResponse{Operation: m}, nil
}

func (h *operationHandler) ListOperations(ctx context.Context, _ *bangerv1.ListOperationsRequest) (*bangerv1.ListOperationsResponse, error) {
	list, err := h.svc.Operations(ctx)
	if err != nil {
		return nil, err
	}
	return &bangerv1.ListOperationsResponse{Operations: operationMessages(list)}, nil
}

func (h *operationHandler) WatchOperation(ctx context.Context, r *bangerv1.WatchOperationRequest, stream *connect.ServerStream[bangerv1.WatchOperationResponse]) error {
	return streamed(ctx, h.ending, func(ctx context.Context) error {
		return h.svc.WatchOperation(ctx, r.GetId(), func(op operation.Operation) error {
			m, err := h.final(ctx, op)
			if err != nil {
				return err
			}
			return stream.Send(&bangerv1.WatchOperationResponse{Operation: m})
		})
	})
}

func (h *operationHandler) CancelOperation(ctx context.Context, r *bangerv1.CancelOperationRequest) (*bangerv1.CancelOperationResponse, error) {
	op, err := h.svc.Cancel(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &bangerv1.CancelOperationResponse{Operation: operationMessage(op)}, nil
}

type daemonHandler struct {
	svc  Service
	info Info
}

func (h *daemonHandler) GetStatus(ctx context.Context, _ *bangerv1.GetStatusRequest) (*bangerv1.GetStatusResponse, error) {
	s, err := h.svc.Status(ctx)
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetStatusResponse{
		Pid: int32(h.info.PID), Version: h.info.Version, ApiRevision: int32(h.info.Revision),
		Socket: h.info.Socket, Log: h.info.Log, StateDir: h.info.StateDir, RuntimeDir: s.RuntimeDir, DnsAddress: s.DNS,
		Vmm: s.VMM, Accel: s.Accel, VmmNotice: s.VMMNotice, StartedAt: stamp(h.info.StartedAt),
		VmsTotal: int32(s.Total), VmsRunning: int32(s.Running), OperationsRunning: int32(s.OperationsRunning),
		Warnings:       append(append([]string(nil), h.info.Warnings...), s.Warnings...),
		InstallationId: s.InstallationID,
		VmmVersion:     s.VMMVersion, Network: s.Network, Images: int32(s.Images), VmsByState: byState(s.ByState),
	}, nil
}

func byState(counts map[vm.State]int) map[string]int32 {
	out := map[string]int32{}
	for state, n := range counts {
		out[string(state)] = int32(n)
	}
	return out
}

func (h *daemonHandler) Shutdown(context.Context, *bangerv1.ShutdownRequest) (*bangerv1.ShutdownResponse, error) {
	h.info.Shutdown()
	return &bangerv1.ShutdownResponse{}, nil
}

func (h *daemonHandler) RunDoctor(ctx context.Context, r *bangerv1.RunDoctorRequest) (*bangerv1.RunDoctorResponse, error) {
	return &bangerv1.RunDoctorResponse{Findings: findingMessages(h.svc.Doctor(ctx, r.GetFix()))}, nil
}

func (h *daemonHandler) Watch(ctx context.Context, _ *bangerv1.WatchRequest, stream *connect.ServerStream[bangerv1.WatchResponse]) error {
	_, byDefault, err := h.svc.Images(ctx)
	if err != nil {
		return err
	}
	return streamed(ctx, h.info.Ending, func(ctx context.Context) error {
		return h.svc.Watch(ctx, func(e sandbox.Event) error { return stream.Send(eventMessage(e, byDefault)) })
	})
}

func sshConfigMessage(c sandbox.SSHConfig) *bangerv1.SSHConfig {
	return &bangerv1.SSHConfig{Path: c.Path, Text: c.Text, Installed: c.Installed, Included: c.Included}
}

func (h *daemonHandler) GetSSHConfig(ctx context.Context, r *bangerv1.GetSSHConfigRequest) (*bangerv1.GetSSHConfigResponse, error) {
	c, err := h.svc.SSHConfig(ctx, r.GetProgram())
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetSSHConfigResponse{Config: sshConfigMessage(c)}, nil
}

func (h *daemonHandler) InstallSSHConfig(ctx context.Context, r *bangerv1.InstallSSHConfigRequest) (*bangerv1.InstallSSHConfigResponse, error) {
	c, err := h.svc.InstallSSHConfig(ctx, r.GetProgram(), r.GetInclude())
	if err != nil {
		return nil, err
	}
	return &bangerv1.InstallSSHConfigResponse{Config: sshConfigMessage(c)}, nil
}

func (h *daemonHandler) RemoveSSHConfig(ctx context.Context, _ *bangerv1.RemoveSSHConfigRequest) (*bangerv1.RemoveSSHConfigResponse, error) {
	return &bangerv1.RemoveSSHConfigResponse{}, h.svc.RemoveSSHConfig(ctx)
}
