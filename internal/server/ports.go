package server

import (
	"context"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func (h *vmHandler) GetPorts(ctx context.Context, r *bangerv1.GetPortsRequest) (*bangerv1.GetPortsResponse, error) {
	resp := &bangerv1.GetPortsResponse{}
	for _, p := range h.svc.Ports(ctx, r.GetRefs()) {
		resp.Results = append(resp.Results, portsMessage(p))
	}
	return resp, nil
}

func portsMessage(p sandbox.Ports) *bangerv1.VMPorts {
	m := &bangerv1.VMPorts{Ref: p.Ref, Host: p.Host}
	if p.VM.ID != "" {
		m.Vm = vmMessage(p.VM)
	}
	if p.Err != nil {
		m.Fault = FaultMessage(p.Err)
	}
	for _, port := range p.Ports {
		m.Ports = append(m.Ports, &bangerv1.Port{
			Protocol: port.Protocol, Address: port.Address, Port: uint32(port.Port), Loopback: port.Loopback, Unreachable: p.Host != "" && !port.Reached,
			Pid: int32(port.PID), Process: port.Process, Command: port.Command,
			Scheme: port.Scheme, Status: int32(port.Status), Title: port.Title,
		})
	}
	return m
}

func (h *vmHandler) TrimVM(ctx context.Context, r *bangerv1.TrimVMRequest) (*bangerv1.TrimVMResponse, error) {
	op, err := h.svc.Trim(ctx, vm.ID(r.GetId()))
	if err != nil {
		return nil, err
	}
	return &bangerv1.TrimVMResponse{Operation: operationMessage(op)}, nil
}
