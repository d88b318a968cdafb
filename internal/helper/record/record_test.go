package record

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestRecords(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "records"))
	if all, err := d.All(); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	release, err := d.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a := Record{UID: 1000, Installation: "a1b2c3d4e5f6", Bridge: "banger0", Addresses: []netip.Prefix{netip.MustParsePrefix("172.16.88.1/24")}, Guarded: true}
	b := Record{UID: 1001, Installation: "b1b2c3d4e5f6", Bridge: "banger1", Addresses: []netip.Prefix{netip.MustParsePrefix("fd00::1/64")}}
	if err := errors.Join(d.Put(a), d.Put(b), d.Put(b)); err != nil {
		t.Fatal(err)
	}
	if all, err := d.All(); err != nil || !reflect.DeepEqual(all, []Record{a, b}) {
		t.Errorf("%+v, %v", all, err)
	}
	if err := errors.Join(d.Drop(a.Installation), d.Drop(a.Installation)); err != nil {
		t.Error(err)
	}
	if r, err := d.Get(a.Installation); r != nil || err != nil {
		t.Errorf("%+v, %v", r, err)
	}

	// Whoever waits for the lock gets it when it is let go, and waits no longer than it wants to.
	bounded, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := d.Lock(bounded); !fault.Is(err, fault.Timeout) {
		t.Errorf("%v", err)
	}
	got := make(chan error)
	go func() {
		again, err := d.Lock(t.Context())
		if err == nil {
			again()
		}
		got <- err
	}()
	release()
	if err := <-got; err != nil {
		t.Error(err)
	}

	// What is damaged is said, with what to do; it is not taken for nothing.
	for _, text := range []string{"", "{", `{"installation":"c1b2c3d4e5f6"}`} {
		if err := os.WriteFile(filepath.Join(string(d), b.Installation), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := d.All(); !fault.Is(err, fault.Corrupt) || !strings.HasPrefix(fault.HintOf(err), "sudo rm ") {
			t.Errorf("%q: %v, hint %q", text, err, fault.HintOf(err))
		}
	}
}
