package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// bus plays the system's bus with a systemd-resolved on it, over a real socket: the greeting (the D-Bus specification's
// "Authentication Protocol"), then calls, each noted as text and answered, with an error if refuse says so.
type bus struct {
	mu     sync.Mutex
	calls  []string
	refuse map[string]string // method to error name
	conn   net.Conn
}

// owner says that a name of the bus has another owner now.
func (b *bus) owner(t *testing.T, name, now string) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	m := &dbus.Message{Type: dbus.TypeSignal, Body: []any{name, "", now}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldSender:    dbus.MakeVariant("org.freedesktop.DBus"),
		dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath("/org/freedesktop/DBus")),
		dbus.FieldInterface: dbus.MakeVariant("org.freedesktop.DBus"),
		dbus.FieldMember:    dbus.MakeVariant("NameOwnerChanged"),
		dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf("", "", "")),
	}}
	if err := m.EncodeTo(b.conn, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
}

// until waits for a call to have been made so many times.
func (b *bus) until(t *testing.T, call string, times int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		n := 0
		for _, c := range b.noted() {
			if strings.Contains(c, " "+call+"(") {
				n++
			}
		}
		if n == times {
			return
		}
		if n > times || time.Now().After(end) {
			t.Fatalf("%d calls of %s, want %d:\n%s", n, call, times, strings.Join(b.noted(), "\n"))
		}
	}
}

func (b *bus) start(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+path)
	served := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			served <- nil // nobody came
			return
		}
		defer conn.Close()
		served <- b.serve(conn)
	}()
	t.Cleanup(func() {
		_ = l.Close()
		if err := <-served; err != nil {
			t.Errorf("the bus: %v", err)
		}
	})
}

func (b *bus) serve(conn net.Conn) error {
	in := bufio.NewReader(conn)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		line = strings.TrimLeft(strings.TrimSpace(line), "\x00")
		if line == "BEGIN" {
			break
		}
		reply := "ERROR"
		switch {
		case line == "AUTH":
			reply = "REJECTED EXTERNAL"
		case strings.HasPrefix(line, "AUTH EXTERNAL"), line == "DATA":
			reply = "OK 0123456789abcdef0123456789abcdef"
		}
		if _, err := fmt.Fprintf(conn, "%s\r\n", reply); err != nil {
			return err
		}
	}
	b.mu.Lock()
	b.conn = conn
	b.mu.Unlock()
	for {
		call, err := dbus.DecodeMessage(in)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		m := b.answer(call)
		b.mu.Lock()
		err = m.EncodeTo(conn, binary.LittleEndian)
		b.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

func (b *bus) answer(call *dbus.Message) *dbus.Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	method := call.Headers[dbus.FieldMember].Value().(string)
	m := &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(call.Serial()),
		dbus.FieldSender:      dbus.MakeVariant("org.freedesktop.resolve1"),
	}}
	if method == "Hello" {
		m.Body = []any{":1.1"}
	} else {
		signature := ""
		if s, ok := call.Headers[dbus.FieldSignature]; ok {
			signature = s.Value().(dbus.Signature).String()
		}
		b.calls = append(b.calls, strings.TrimSpace(fmt.Sprintf("%s %s(%s) %v", call.Headers[dbus.FieldInterface].Value(), method, signature, call.Body)))
		if name, ok := b.refuse[method]; ok {
			m.Type, m.Body = dbus.TypeError, []any{"no"}
			m.Headers[dbus.FieldErrorName] = dbus.MakeVariant(name)
		}
	}
	if len(m.Body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
	}
	return m
}

func (b *bus) noted() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.calls)
}

func dialResolved(t *testing.T) *Resolved {
	t.Helper()
	r, err := DialResolved(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func TestPoint(t *testing.T) {
	b := &bus{}
	b.start(t)
	r := dialResolved(t)
	if err := r.Point(t.Context(), 5, netip.MustParseAddrPort("127.0.0.1:42069")); err != nil {
		t.Fatal(err)
	}
	if err := r.Revert(t.Context(), 5); err != nil {
		t.Fatal(err)
	}
	const m = "org.freedesktop.resolve1.Manager "
	want := []string{
		m + "SetLinkDomains(ia(sb)) [5 [[vm true]]]",
		m + "SetLinkDefaultRoute(ib) [5 false]",
		m + "SetLinkDNSSEC(is) [5 no]",
		m + "SetLinkDNSOverTLS(is) [5 no]",
		m + "SetLinkLLMNR(is) [5 no]",
		m + "SetLinkMulticastDNS(is) [5 no]",
		m + "SetLinkDNSEx(ia(iayqs)) [5 [[2 [127 0 0 1] 42069 ]]]",
		m + "FlushCaches() []",
		m + "RevertLink(i) [5]",
	}
	if diff := cmp.Diff(want, b.noted()); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}

// TestPointRefused wants nothing left half set, and to know why.
func TestPointRefused(t *testing.T) {
	for name, code := range map[string]fault.Code{
		"org.freedesktop.DBus.Error.InteractiveAuthorizationRequired": fault.Permission,
		"org.freedesktop.DBus.Error.AccessDenied":                     fault.Permission,
		"org.freedesktop.DBus.Error.UnknownMethod":                    fault.Unavailable, // older than 246
		"org.freedesktop.DBus.Error.ServiceUnknown":                   fault.Unavailable,
	} {
		b := &bus{refuse: map[string]string{"SetLinkDNSEx": name}}
		b.start(t)
		err := dialResolved(t).Point(t.Context(), 5, netip.MustParseAddrPort("[::1]:42069"))
		if !fault.Is(err, code) {
			t.Errorf("%s: %v, want %s", name, err, code)
		}
		calls := b.noted()
		if last := calls[len(calls)-1]; last != "org.freedesktop.resolve1.Manager RevertLink(i) [5]" {
			t.Errorf("%s: the last call is %s", name, last)
		}
	}
}

func TestRevertOfALinkThatWent(t *testing.T) {
	b := &bus{refuse: map[string]string{"RevertLink": "org.freedesktop.resolve1.NoSuchLink"}}
	b.start(t)
	if err := dialResolved(t).Revert(t.Context(), 5); err != nil {
		t.Error(err)
	}
}

// TestKeep tells a resolver, tells the next one again, and takes it back in the end.
func TestKeep(t *testing.T) {
	b := &bus{}
	b.start(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 1)
	go func() {
		done <- Keep(ctx, 5, netip.MustParseAddrPort("127.0.0.1:42069"), slog.New(slog.DiscardHandler))
	}()
	b.until(t, "FlushCaches", 1)
	b.owner(t, "org.example.Other", ":1.7")
	b.owner(t, "org.freedesktop.resolve1", "") // it ends
	b.owner(t, "org.freedesktop.resolve1", ":1.8")
	b.until(t, "FlushCaches", 2)
	b.owner(t, "org.freedesktop.resolve1", ":1.9")
	b.until(t, "FlushCaches", 3)
	b.until(t, "RevertLink", 0)
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	b.until(t, "RevertLink", 1)
}

// TestKeepWaitsForAResolver: one that comes later is told; one that takes no orders from this user ends it.
func TestKeepWaitsForAResolver(t *testing.T) {
	b := &bus{refuse: map[string]string{"SetLinkDomains": "org.freedesktop.DBus.Error.NameHasNoOwner"}}
	b.start(t)
	done := make(chan error, 1)
	go func() {
		done <- Keep(t.Context(), 5, netip.MustParseAddrPort("127.0.0.1:42069"), slog.New(slog.DiscardHandler))
	}()
	b.until(t, "SetLinkDomains", 1)
	b.mu.Lock()
	b.refuse["SetLinkDomains"] = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
	b.mu.Unlock()
	b.owner(t, "org.freedesktop.resolve1", ":1.8")
	if err := <-done; !fault.Is(err, fault.Permission) {
		t.Errorf("%v, want that it may not", err)
	}
}

// TestKeepOfALinkThatIsNew: the resolver hears of a link a moment after whoever made it.
func TestKeepOfALinkThatIsNew(t *testing.T) {
	b := &bus{refuse: map[string]string{"SetLinkDomains": "org.freedesktop.resolve1.NoSuchLink"}}
	b.start(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Keep(ctx, 5, netip.MustParseAddrPort("127.0.0.1:42069"), slog.New(slog.DiscardHandler))
	}()
	b.until(t, "SetLinkDomains", 1)
	b.mu.Lock()
	delete(b.refuse, "SetLinkDomains")
	b.mu.Unlock()
	b.until(t, "FlushCaches", 1)
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestNoBus(t *testing.T) {
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+filepath.Join(t.TempDir(), "none"))
	if r, err := DialResolved(t.Context()); !fault.Is(err, fault.Unavailable) {
		t.Errorf("%v, %v; want unavailable", r, err)
	}
}
