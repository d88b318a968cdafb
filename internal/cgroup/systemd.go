package cgroup

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/godbus/dbus/v5"
)

// GuestsUnit is the service that powers guests off before a host, or a user's manager, goes down; banger daemon install
// makes it. Where it is not there, nothing is ordered.
const GuestsUnit = "banger-guests.service"

// property is one of a unit's, as org.freedesktop.systemd1(5) writes them.
type property struct {
	Name  string
	Value dbus.Variant
}

// manager is a connection to a manager of systemd, made for one scope: it needs no bus, and nothing to restore when systemd
// is replaced.
type manager struct{ conn *dbus.Conn }

// greet connects to the manager with that socket, as the user uid.
func greet(ctx context.Context, socket string, uid int) (*manager, error) {
	var d net.Dialer
	raw, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := raw.SetDeadline(deadline); err != nil { // for the greeting, which knows no context
			return nil, errors.Join(err, raw.Close())
		}
	}
	conn, err := dbus.NewConn(raw)
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	if err := conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(uid))}); err != nil {
		return nil, errors.Join(fmt.Errorf("systemd: %w", err), conn.Close())
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &manager{conn}, nil
}

func (m *manager) close() { _ = m.conn.Close() }

// startScope has systemd put a process into a transient scope, and waits until it has.
func (m *manager) startScope(ctx context.Context, of int, name, description string, l Limits, pid int) error {
	// A private connection is sent every signal, asked or not. Listening first: the job may be over before
	// its name is here.
	signals := make(chan *dbus.Signal, 64)
	m.conn.Signal(signals)

	var job dbus.ObjectPath
	systemd := m.conn.Object("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
	err := systemd.CallWithContext(ctx, "org.freedesktop.systemd1.Manager.StartTransientUnit", 0,
		name, "fail", properties(of, description, l, pid), []struct {
			Name       string
			Properties []property
		}{}).Store(&job)
	if err != nil {
		return fmt.Errorf("systemd: %w", err)
	}
	for {
		select {
		case s, ok := <-signals:
			if !ok {
				return errors.New("systemd: it closed the connection")
			}
			if s.Name != "org.freedesktop.systemd1.Manager.JobRemoved" || len(s.Body) != 4 || s.Body[1] != job {
				continue
			}
			if result := s.Body[3]; result != "done" {
				return fmt.Errorf("systemd: the start of %s ended with %q", name, result)
			}
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// properties of a scope: systemd.scope(5), systemd.resource-control(5). One that root makes of another user's is in that user's slice, whose
// bounds hold for it, and stops after that user's manager, where GuestsUnit is (user@.service(5)).
func properties(of int, description string, l Limits, pid int) []property {
	before := []string{GuestsUnit}
	var slice []property
	if of != 0 {
		before = append(before, fmt.Sprintf("user@%d.service", of))
		slice = []property{{"Slice", dbus.MakeVariant(fmt.Sprintf("user-%d.slice", of))}}
	}
	return append(slice, []property{
		{"Description", dbus.MakeVariant(description)},
		{"PIDs", dbus.MakeVariant([]uint32{uint32(pid)})},
		// Units stop in the reverse of this order: guests are powered off while their programs still run.
		{"Before", dbus.MakeVariant(before)},
		{"MemoryMax", dbus.MakeVariant(uint64(l.Memory))},
		{"CPUQuotaPerSecUSec", dbus.MakeVariant(uint64(l.CPUs * float64(time.Second/time.Microsecond)))},
		{"TasksMax", dbus.MakeVariant(uint64(l.Tasks))},
		// A VMM that was killed leaves no failed unit behind.
		{"CollectMode", dbus.MakeVariant("inactive-or-failed")},
	}...)
}
