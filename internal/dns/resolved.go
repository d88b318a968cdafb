package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/godbus/dbus/v5"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Resolved tells systemd-resolved which server has the names under .vm, by way of a network link of ours
// (org.freedesktop.resolve1(5)). What it sets goes with the link, with a restart of systemd-resolved, and with Revert. Calls
// are one at a time.
type Resolved struct {
	conn *dbus.Conn
	end  context.CancelFunc // of the connection
}

// busTimeout bounds a connection's greeting, and each call.
const busTimeout = 5 * time.Second

// DialResolved connects to systemd-resolved on the system's bus, whose address is $DBUS_SYSTEM_BUS_ADDRESS or the usual one.
// Close ends the connection. fault.Unavailable if there is no bus.
func DialResolved(ctx context.Context) (*Resolved, error) {
	bound, stop := context.WithTimeout(ctx, busTimeout)
	defer stop()
	// The connection ends with its context, so that one may not be the caller's once it is made.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	keep := context.AfterFunc(bound, end)
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(life))
	if !keep() && err == nil {
		err = errors.Join(context.Cause(bound), conn.Close())
	}
	if err != nil {
		end()
		return nil, fault.Wrap(err, fault.Unavailable, "systemd-resolved", "the system's bus cannot be reached")
	}
	return &Resolved{conn, end}, nil
}

// Close lets go of the bus and leaves what was set.
func (r *Resolved) Close() error {
	defer r.end()
	return r.conn.Close()
}

// server is resolve1's (iayqs): family, address, port, name for TLS.
type server struct {
	Family  int32
	Address []byte
	Port    uint16
	Name    string
}

// domain is resolve1's (sb): a name, and whether it only routes queries and completes no short names.
type domain struct {
	Name      string
	RouteOnly bool
}

// Point has queries for .vm, and no others, go to the server at addr by way of the link. It sets the whole, and can be
// repeated. Needs root or polkit's leave: fault.Permission without. fault.Unavailable without a
// systemd-resolved of version 246 or later.
func (r *Resolved) Point(ctx context.Context, link int, addr netip.AddrPort) error {
	family := int32(2) // AF_INET
	if addr.Addr().Is6() {
		family = 10 // AF_INET6
	}
	i := int32(link)
	for _, c := range []struct {
		method string
		args   []any
	}{
		// The domain first: a server without one would be asked for everything in between.
		{"SetLinkDomains", []any{i, []domain{{Domain, true}}}},
		{"SetLinkDefaultRoute", []any{i, false}},
		// The root's signatures say that there is no .vm, and this server speaks no TLS, whatever is set for others.
		{"SetLinkDNSSEC", []any{i, "no"}},
		{"SetLinkDNSOverTLS", []any{i, "no"}},
		// Ex: the plain call has no port.
		{"SetLinkDNSEx", []any{i, []server{{family, addr.Addr().AsSlice(), addr.Port(), ""}}}},
	} {
		if err := r.call(ctx, c.method, c.args...); err != nil {
			return errors.Join(err, r.Revert(context.WithoutCancel(ctx), link))
		}
	}
	// Somebody may have asked for a name before, and "no" been kept.
	return r.call(ctx, "FlushCaches")
}

// Revert takes back what Point set. Fine if nothing was set or the link is gone.
func (r *Resolved) Revert(ctx context.Context, link int) error {
	err := r.call(ctx, "RevertLink", int32(link))
	var de dbus.Error
	if errors.As(err, &de) && de.Name == "org.freedesktop.resolve1.NoSuchLink" {
		return nil
	}
	return err
}

func (r *Resolved) call(ctx context.Context, method string, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	const name, path = "org.freedesktop.resolve1", "/org/freedesktop/resolve1"
	err := r.conn.Object(name, path).CallWithContext(ctx, name+".Manager."+method, 0, args...).Err
	if err == nil {
		return nil
	}
	code := fault.Unavailable
	var de dbus.Error
	if errors.As(err, &de) && (de.Name == "org.freedesktop.DBus.Error.AccessDenied" || de.Name == "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired") {
		code = fault.Permission
	}
	return fault.Wrap(fmt.Errorf("%s: %w", method, err), code, "systemd-resolved", "it does not take the server for .%s", Domain)
}
