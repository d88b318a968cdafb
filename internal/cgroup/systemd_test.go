package cgroup

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

// fakeManager plays systemd on its private socket for one connection: the greeting (the D-Bus
// specification's "Authentication Protocol"), one call, which it hands out, and what answer sends.
func fakeManager(t *testing.T, h *Host, answer func(send func(*dbus.Message), call *dbus.Message)) (calls <-chan []any) {
	t.Helper()
	files(t, h.run, "systemd/system/x", "")
	l, err := net.Listen("unix", filepath.Join(h.run, "systemd/private"))
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan []any, 1)
	t.Cleanup(func() { _ = l.Close() })
	served := make(chan error, 1)
	go func() {
		defer close(got) // nobody waits for a call that will not come
		served <- func() error {
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			defer conn.Close()
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
				reply, ok := map[string]string{
					"AUTH": "REJECTED EXTERNAL", "AUTH EXTERNAL": "DATA", "DATA": "OK 0123456789abcdef0123456789abcdef",
				}[line]
				if !ok {
					return fmt.Errorf("the greeting has a line %q", line)
				}
				if _, err := fmt.Fprintf(conn, "%s\r\n", reply); err != nil {
					return err
				}
			}
			if _, err := in.Peek(1); errors.Is(err, io.EOF) {
				return nil // nothing is asked for
			}
			call, err := dbus.DecodeMessage(in)
			if err != nil {
				return err
			}
			got <- call.Body
			answer(func(m *dbus.Message) {
				m.Headers[dbus.FieldSender] = dbus.MakeVariant("org.freedesktop.systemd1")
				if len(m.Body) > 0 {
					m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
				}
				if err := m.EncodeTo(conn, binary.LittleEndian); err != nil {
					t.Errorf("the manager's answer: %v", err)
				}
			}, call)
			_, _ = in.ReadByte() // until the caller hangs up
			return nil
		}()
	}()
	t.Cleanup(func() {
		_ = l.Close()
		if err := <-served; err != nil {
			t.Errorf("the manager: %v", err)
		}
	})
	return got
}

func reply(call *dbus.Message, typ dbus.Type, body ...any) *dbus.Message {
	return &dbus.Message{Type: typ, Body: body, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(call.Serial()),
	}}
}

func jobRemoved(job dbus.ObjectPath, unit, result string) *dbus.Message {
	return &dbus.Message{Type: dbus.TypeSignal, Body: []any{uint32(7), job, unit, result}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath("/org/freedesktop/systemd1")),
		dbus.FieldInterface: dbus.MakeVariant("org.freedesktop.systemd1.Manager"),
		dbus.FieldMember:    dbus.MakeVariant("JobRemoved"),
	}}
}

// TestScope looks at what systemd is asked for, and at what becomes of each of its answers.
func TestScope(t *testing.T) {
	const ours, another = dbus.ObjectPath("/org/freedesktop/systemd1/job/2"), dbus.ObjectPath("/org/freedesktop/systemd1/job/1")
	unit := fmt.Sprintf("banger-0123456789ab-aaaaaaaaaaaa-%d.scope", os.Getpid())
	for _, c := range []struct {
		name   string
		answer func(send func(*dbus.Message), call *dbus.Message)
		why    string // as Group says it
	}{
		{"done", func(send func(*dbus.Message), call *dbus.Message) {
			send(jobRemoved(another, "cron.service", "failed"))
			send(reply(call, dbus.TypeMethodReply, ours))
			send(jobRemoved(another, "cron.service", "failed"))
			send(jobRemoved(ours, unit, "done"))
		}, ""},
		{"done before it is said", func(send func(*dbus.Message), call *dbus.Message) {
			send(jobRemoved(ours, unit, "done"))
			send(reply(call, dbus.TypeMethodReply, ours))
		}, ""},
		{"failed", func(send func(*dbus.Message), call *dbus.Message) {
			send(reply(call, dbus.TypeMethodReply, ours))
			send(jobRemoved(ours, unit, "failed"))
		}, "systemd: the start of " + unit + ` ended with "failed"`},
		{"refused", func(send func(*dbus.Message), call *dbus.Message) {
			m := reply(call, dbus.TypeError, "Interactive authentication\nrequired.")
			m.Headers[dbus.FieldErrorName] = dbus.MakeVariant("org.freedesktop.DBus.Error.AccessDenied")
			send(m)
		}, "systemd: Interactive authentication required."},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := fake(t, "/")
			calls := fakeManager(t, h, c.answer)
			h.Put(t.Context(), "aaaaaaaaaaaa", "banger VM calm-otter", Limits{Memory: 1 << 30, CPUs: 2.5, Tasks: 100}, os.Getpid())
			want := []any{unit, "fail", [][]any{
				{"Description", dbus.MakeVariant("banger VM calm-otter")},
				{"PIDs", dbus.MakeVariant([]uint32{uint32(os.Getpid())})},
				{"Before", dbus.MakeVariant([]string{"banger-guests.service"})},
				{"MemoryMax", dbus.MakeVariant(uint64(1 << 30))},
				{"CPUQuotaPerSecUSec", dbus.MakeVariant(uint64(2_500_000))},
				{"TasksMax", dbus.MakeVariant(uint64(100))},
				{"CollectMode", dbus.MakeVariant("inactive-or-failed")},
			}, [][]any{}}
			if diff := cmp.Diff(fmt.Sprint(want), fmt.Sprint(<-calls)); diff != "" {
				t.Errorf("asked (-want +got):\n%s", diff)
			}
			h.mu.Lock()
			defer h.mu.Unlock()
			if got := h.why["aaaaaaaaaaaa"]; got != c.why {
				t.Errorf("why %q, want %q", got, c.why)
			}
		})
	}
}

// TestNothingStarted: where no process is started after all, systemd is asked for nothing, and nothing is said of a group.
func TestNothingStarted(t *testing.T) {
	h := fake(t, "/")
	calls := fakeManager(t, h, nil)
	h.Begin(t.Context(), "aaaaaaaaaaaa", "banger VM calm-otter", Limits{Memory: 1 << 30})(t.Context(), 0)
	if call, asked := <-calls; asked {
		t.Errorf("asked for %v", call)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.why) != 0 {
		t.Errorf("why: %v", h.why)
	}
}

// TestNoScopeWithoutLingering: the manager of a user who does not linger is there, and is asked for nothing: its scopes would end with the
// user's last session.
func TestNoScopeWithoutLingering(t *testing.T) {
	h := fake(t, "/")
	h.user = func() (*user.User, error) { return &user.User{Uid: "1000", Username: "you"}, nil }
	files(t, h.run, "systemd/system/x", "", "user/1000/systemd/x", "")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(h.run, "user/1000/systemd/private"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h.Begin(t.Context(), "aaaaaaaaaaaa", "banger VM calm-otter", Limits{Memory: 1 << 30})(t.Context(), os.Getpid())
	if err := l.SetDeadline(time.Now().Add(50 * time.Millisecond)); err != nil { // who has connected waits to be taken
		t.Fatal(err)
	}
	if conn, err := l.Accept(); err == nil {
		_ = conn.Close()
		t.Error("the user's manager was asked")
	}
	if _, _, why := h.Group("aaaaaaaaaaaa", "/"); !strings.Contains(why, "does not linger") {
		t.Errorf("why: %q", why)
	}
}

// TestScopeForAnotherUser: what root makes of a user's VM is in that user's slice, and stops after that user's manager.
func TestScopeForAnotherUser(t *testing.T) {
	got := map[string]string{}
	for _, p := range properties(1000, "banger VM 0123456789ab of user 1000", Limits{Memory: 1 << 30, CPUs: 2, Tasks: 100}, 4711) {
		got[p.Name] = p.Value.String()
	}
	if got["Slice"] != `"user-1000.slice"` || got["Before"] != `["banger-guests.service", "user@1000.service"]` {
		t.Errorf("%v", got)
	}
}
