package server

import (
	"context"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
)

func (h *vmHandler) GetStats(ctx context.Context, r *bangerv1.GetStatsRequest) (*bangerv1.GetStatsResponse, error) {
	resp := &bangerv1.GetStatsResponse{}
	for _, st := range h.svc.Stats(ctx, r.GetRefs()) {
		resp.Results = append(resp.Results, statsMessage(st))
	}
	return resp, nil
}

func statsMessage(st sandbox.Stats) *bangerv1.VMStats {
	m := &bangerv1.VMStats{Ref: st.Ref}
	if st.Err != nil {
		m.Fault = FaultMessage(st.Err)
		return m
	}
	m.Vm, m.At = vmMessage(st.VM), stamp(st.At)
	if c := st.Host; c != nil {
		m.Host = &bangerv1.HostStats{CpuMs: c.CPU.Milliseconds(), MemoryBytes: c.Memory,
			DiskAllocatedBytes: c.DiskAllocated, SystemAllocatedBytes: c.SystemAllocated}
	}
	if st.GuestErr != nil {
		m.GuestFault = FaultMessage(st.GuestErr)
		return m
	}
	g := st.Guest
	m.Guest = &bangerv1.GuestStats{
		UptimeMs: g.GetUptimeMs(), Cpus: g.GetCpus(), CpuBusyMs: g.GetCpuBusyMs(), CpuIdleMs: g.GetCpuIdleMs(),
		Load1Milli: g.GetLoad1Milli(), Load5Milli: g.GetLoad5Milli(), Load15Milli: g.GetLoad15Milli(),
		MemoryTotalBytes: g.GetMemoryTotalBytes(), MemoryAvailableBytes: g.GetMemoryAvailableBytes(),
		SwapTotalBytes: g.GetSwapTotalBytes(), SwapFreeBytes: g.GetSwapFreeBytes(),
	}
	for _, d := range g.GetDisks() {
		m.Guest.Disks = append(m.Guest.Disks, &bangerv1.GuestDisk{Target: d.GetTarget(), TotalBytes: d.GetTotalBytes(),
			UsedBytes: d.GetUsedBytes(), AvailableBytes: d.GetAvailableBytes()})
	}
	for _, i := range g.GetInterfaces() {
		m.Guest.Interfaces = append(m.Guest.Interfaces, &bangerv1.GuestInterface{Name: i.GetName(),
			ReceivedBytes: i.GetReceivedBytes(), SentBytes: i.GetSentBytes()})
	}
	return m
}
