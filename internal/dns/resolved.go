package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

// resolve1 is its name on the bus.
const resolve1 = "org.freedesktop.resolve1"

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

// Keep has the resolver asked for .vm by way of a link until ctx ends, whenever it starts, and takes it back then. It starts no
// resolver: without one, or without leave to tell it, it returns why.
func Keep(ctx context.Context, link int, addr netip.AddrPort, log *slog.Logger) error {
	r, err := DialResolved(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	starts, err := r.starts(ctx)
	if err != nil {
		return err
	}
	const first, most = 100 * time.Millisecond, 10 * time.Second
	for pause := first; ; {
		var again <-chan time.Time
		err := r.Point(ctx, link, addr)
		switch {
		case noSuchLink(err): // not yet: it hears of links by itself, and tells nobody when
			again, pause = time.After(pause), min(2*pause, most)
		case fault.Is(err, fault.Permission):
			return err
		case ctx.Err() != nil:
		case err != nil: // there is none, which may change
			log.Info("systemd-resolved is not told of names under ."+Domain, "err", err)
		default:
			log.Info("systemd-resolved asks for names under ."+Domain, "link", link, "addr", addr)
		}
		select {
		case <-ctx.Done():
			err := r.Revert(context.WithoutCancel(ctx), link)
			if err != nil {
				log.Info("systemd-resolved did not take back what it was told", "link", link, "err", err)
			}
			return nil
		case <-r.conn.Context().Done():
			return fault.New(fault.Unavailable, "systemd-resolved", "the system's bus went away")
		case <-starts:
			pause = first
		case <-again:
		}
	}
}

// noSuchLink tells whether the resolver said that it knows no such link.
func noSuchLink(err error) bool {
	var de dbus.Error
	return errors.As(err, &de) && de.Name == "org.freedesktop.resolve1.NoSuchLink"
}

// starts tells when a resolver comes to the bus: a new one knows nothing of what the former was told.
func (r *Resolved) starts(ctx context.Context) (<-chan struct{}, error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	err := r.conn.AddMatchSignalContext(ctx, dbus.WithMatchSender("org.freedesktop.DBus"), dbus.WithMatchInterface("org.freedesktop.DBus"),
		dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, resolve1))
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "systemd-resolved", "the system's bus does not tell when it starts")
	}
	signals, starts := make(chan *dbus.Signal, 8), make(chan struct{}, 1)
	r.conn.Signal(signals)
	go func() { // until the connection ends, which closes signals
		for s := range signals {
			if len(s.Body) != 3 || s.Body[0] != resolve1 || s.Body[2] == "" { // name, old owner, new owner
				continue
			}
			select {
			case starts <- struct{}{}:
			default:
			}
		}
	}()
	return starts, nil
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
		// Short names are not asked of guests, which could answer for anybody.
		{"SetLinkLLMNR", []any{i, "no"}},
		{"SetLinkMulticastDNS", []any{i, "no"}},
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
	if err := r.call(ctx, "RevertLink", int32(link)); !noSuchLink(err) {
		return err
	}
	return nil
}

func (r *Resolved) call(ctx context.Context, method string, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	// Whether there is to be a resolver is the host's business: the call starts none.
	err := r.conn.Object(resolve1, "/org/freedesktop/resolve1").CallWithContext(ctx, resolve1+".Manager."+method, dbus.FlagNoAutoStart, args...).Err
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
