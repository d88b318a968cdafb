package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func newVM(name string) vm.VM {
	return vm.VM{ID: vm.NewID(), Name: name, State: vm.Defined, Desired: vm.WantRunning, CreatedAt: time.Now().UTC()}
}

func newOp(v vm.VM) operation.Operation {
	return operation.Operation{ID: operation.NewID(), Kind: operation.Create, VMID: string(v.ID), VMName: v.Name, State: operation.Running, CreatedAt: time.Now().UTC()}
}

func admit(t *testing.T, s *Store, name string) vm.VM {
	t.Helper()
	v := newVM(name)
	v, err := s.AdmitVM(t.Context(), v, newOp(v))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestRecordsSurviveReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a #?%20 b.db") // a path that a URI could misread
	s := open(t, path)
	v := admit(t, s, "calm-otter")
	v.State, v.Spec.Labels = vm.Running, map[string]string{"team": "web"}
	if err := s.Save(t.Context(), v, lifecycle.StepRecord{Step: "one", State: lifecycle.Ready}, lifecycle.StepRecord{Step: "two", State: lifecycle.Preparing}); err != nil {
		t.Fatal(err)
	}
	id := s.InstallationID()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open(t, path)
	if s.InstallationID() != id {
		t.Errorf("installation id changed: %s, %s", id, s.InstallationID())
	}
	got, ok := s.VMByName("calm-otter")
	if diff := cmp.Diff(v, got); !ok || diff != "" {
		t.Errorf("record: %s", diff)
	}
	steps, err := s.Steps(t.Context(), v.ID)
	want := map[string]lifecycle.StepState{"one": lifecycle.Ready, "two": lifecycle.Preparing}
	if diff := cmp.Diff(want, steps); err != nil || diff != "" {
		t.Errorf("steps: %v %s", err, diff)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) == 0 || entries[0].Name() != "a #?%20 b.db" {
		t.Errorf("the database is not where it was asked for: %v %v", entries, err)
	}
}

func TestNamesAreTakenOnce(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	var wg sync.WaitGroup
	errs := make([]error, 10)
	for i := range errs {
		wg.Go(func() {
			v := newVM("calm-otter")
			_, errs[i] = s.AdmitVM(t.Context(), v, newOp(v))
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		switch {
		case err == nil:
			won++
		case !fault.Is(err, fault.Exists) || fault.HintOf(err) == "":
			t.Errorf("got %v, want already_exists with a hint", err)
		}
	}
	if won != 1 || len(s.VMs()) != 1 {
		t.Errorf("%d of ten were admitted, %d recorded", won, len(s.VMs()))
	}
	if ops, err := s.Operations(t.Context()); err != nil || len(ops) != 1 {
		t.Errorf("a refused VM left its operation: %d, %v", len(ops), err)
	}
}

// BenchmarkAdmit is to cost the same with any number of VMs.
func BenchmarkAdmit(b *testing.B) {
	for _, have := range []int{10, 1000, 5000} {
		b.Run(fmt.Sprint(have), func(b *testing.B) {
			s, err := Open(b.Context(), filepath.Join(b.TempDir(), "db"))
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			for i := range have {
				v := newVM(fmt.Sprintf("vm-%d", i))
				if _, err := s.AdmitVM(b.Context(), v, newOp(v)); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				v := newVM("one-more")
				if v, err = s.AdmitVM(b.Context(), v, newOp(v)); err != nil {
					b.Fatal(err)
				}
				if err := s.Forget(b.Context(), v.ID); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestSlotsAreTheSmallestFree(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	var vms []vm.VM
	for i := range 4 {
		v := admit(t, s, fmt.Sprintf("vm-%d", i))
		if v.Lease.Slot != i || v.Lease.CID < 0x10000 {
			t.Errorf("lease of %d: %+v", i, v.Lease)
		}
		vms = append(vms, v)
	}
	for _, i := range []int{2, 0} {
		if err := s.Forget(t.Context(), vms[i].ID); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "copy")
	if _, err := s.db.ExecContext(t.Context(), "VACUUM INTO ?", path); err != nil {
		t.Fatal(err)
	}
	if v := admit(t, open(t, path), "reopened"); v.Lease.Slot != 0 {
		t.Errorf("slot %d after reopening, want 0", v.Lease.Slot)
	}
	for _, want := range []int{0, 2, 4} {
		if v := admit(t, s, fmt.Sprintf("new-%d", want)); v.Lease.Slot != want {
			t.Errorf("slot %d, want %d", v.Lease.Slot, want)
		}
	}
}

func TestForgetTakesTheJournalAlong(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	v := admit(t, s, "calm-otter")
	if err := s.Save(t.Context(), v, lifecycle.StepRecord{Step: "one", State: lifecycle.Ready}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second finds nothing
		if err := s.Forget(t.Context(), v.ID); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := s.VM(v.ID); ok {
		t.Error("still there")
	}
	if err := s.Save(t.Context(), v); !fault.Is(err, fault.NotFound) {
		t.Errorf("saving a forgotten VM: %v", err)
	}
	var n int
	if err := s.db.QueryRow("SELECT count(*) FROM steps").Scan(&n); err != nil || n != 0 {
		t.Errorf("%d steps left, %v", n, err)
	}
}

func TestANewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	if _, err := s.db.Exec(fmt.Sprintf("PRAGMA user_version = %d", len(migrations)+1)); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	if _, err := Open(t.Context(), path); !fault.Is(err, fault.VersionSkew) || fault.HintOf(err) == "" {
		t.Errorf("got %v, want version_skew with a hint", err)
	}
}

func TestMigrationKeepsABackup(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	admit(t, s, "calm-otter")
	_ = s.Close()

	saved := migrations
	defer func() { migrations = saved }()
	migrations = append(append([]string{}, saved...), "CREATE TABLE later (x TEXT) STRICT;")
	s = open(t, path)
	if _, ok := s.VMByName("calm-otter"); !ok {
		t.Error("the record is lost")
	}
	backup, err := sql.Open("sqlite", "file:"+fmt.Sprintf("%s.v%d.bak", path, len(saved)))
	if err != nil {
		t.Fatal(err)
	}
	defer backup.Close()
	var name string
	if err := backup.QueryRow("SELECT name FROM vms").Scan(&name); err != nil || name != "calm-otter" {
		t.Errorf("backup: %q, %v", name, err)
	}
}

// TestVMsFromBeforeNetworks: one that is up gets the record of a network that has nothing to take away, and what
// others have stays.
func TestVMsFromBeforeNetworks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	up, down, fresh := admit(t, s, "up"), admit(t, s, "down"), admit(t, s, "new")
	for v, steps := range map[*vm.VM][]lifecycle.StepRecord{
		&up:    {{Step: "image", State: lifecycle.Ready}, {Step: "guest config", State: lifecycle.Ready}, {Step: "vmm", State: lifecycle.Ready}},
		&down:  {{Step: "image", State: lifecycle.Ready}},
		&fresh: {{Step: "network", State: lifecycle.Cleaning}, {Step: "guest config", State: lifecycle.Cleaning}},
	} {
		if err := s.Save(t.Context(), *v, steps...); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.db.Exec("PRAGMA user_version = 1"); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	s = open(t, path)
	for v, want := range map[*vm.VM]lifecycle.StepState{&up: lifecycle.Ready, &down: "", &fresh: lifecycle.Cleaning} {
		if steps, err := s.Steps(t.Context(), v.ID); err != nil || steps["network"] != want {
			t.Errorf("%s: %v, %v; want the network %q", v.Name, steps, err, want)
		}
	}
}

func TestAFailedMigrationChangesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	_ = open(t, path).Close()
	saved := migrations
	defer func() { migrations = saved }()
	migrations = append(append([]string{}, saved...), "CREATE TABLE half (x TEXT) STRICT; CREATE TABLE half (x TEXT) STRICT;")
	if _, err := Open(t.Context(), path); err == nil {
		t.Fatal("a broken migration was taken")
	}
	migrations = saved
	s := open(t, path)
	var n int
	if err := s.db.QueryRow("SELECT count(*) FROM sqlite_master WHERE name = 'half'").Scan(&n); err != nil || n != 0 {
		t.Errorf("half a migration stayed: %d, %v", n, err)
	}
}

func TestRubbishIsCalledCorrupt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	if err := os.WriteFile(path, []byte("this is no database, whatever it is called, and long enough to be read as one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), path); !fault.Is(err, fault.Corrupt) || fault.HintOf(err) == "" {
		t.Errorf("got %v, want corrupt with a hint", err)
	}
}

func TestWatchersSeeCommitsInOrder(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	var mu sync.Mutex
	var seen []string
	s.Subscribe(func(v vm.VM) { mu.Lock(); seen = append(seen, v.Note); mu.Unlock() }, func(vm.ID) { mu.Lock(); seen = append(seen, "deleted"); mu.Unlock() })
	images := 0
	s.SubscribeImages(func() { images++ })
	if err := errors.Join(s.PutImage(t.Context(), image.Image{ID: "1", Name: "a"}), s.DeleteImage(t.Context(), "a")); err != nil || images != 2 {
		t.Errorf("%v; %d changes of images were told, want 2", err, images)
	}
	v := admit(t, s, "calm-otter")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			c := v
			c.Note = fmt.Sprint(i)
			if err := s.Save(t.Context(), c); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	last, _ := s.VM(v.ID)
	if seen[len(seen)-1] != last.Note {
		t.Errorf("the last change told was %q, the record says %q", seen[len(seen)-1], last.Note)
	}
	if err := s.Forget(t.Context(), v.ID); err != nil || seen[len(seen)-1] != "deleted" {
		t.Errorf("%v, %q", err, seen[len(seen)-1])
	}
}

func TestOperationsAreKeptInOrderAndBounded(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	v := newVM("calm-otter")
	running := newOp(v)
	if err := s.SaveOperation(t.Context(), running); err != nil {
		t.Fatal(err)
	}
	for range keepOperations + 10 {
		op := newOp(v)
		if err := s.SaveOperation(t.Context(), op); err != nil { // as it runs, then as it ended
			t.Fatal(err)
		}
		op.State = operation.Failed
		op.Fault = fault.Wrap(errors.New("why"), fault.Timeout, "calm-otter", "what").WithHint("how")
		if err := s.SaveOperation(t.Context(), op); err != nil {
			t.Fatal(err)
		}
	}
	ops, err := s.Operations(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n := len(ops); n != keepOperations+1 {
		t.Errorf("%d operations are kept", n)
	}
	if ops[len(ops)-1].ID != running.ID {
		t.Error("the running operation was dropped")
	}
	f := ops[0].Fault
	if f == nil || f.Code != fault.Timeout || f.Hint != "how" || f.Cause == nil || f.Cause.Error() != "why" {
		t.Errorf("fault: %+v", f)
	}
}

func TestImagesReplaceByName(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	for _, id := range []string{"a", "b"} {
		if err := s.PutImage(t.Context(), image.Image{ID: id, Name: "default"}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := s.Images(t.Context())
	if err != nil || len(list) != 1 || list[0].ID != "b" {
		t.Errorf("%v %v", list, err)
	}
}

// BenchmarkVMs is the part of a list that the store pays: it must not touch the disk.
func BenchmarkVMs(b *testing.B) {
	s, err := Open(context.Background(), filepath.Join(b.TempDir(), "db"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for i := range 1000 {
		v := newVM(fmt.Sprintf("vm-%d", i))
		if _, err := s.AdmitVM(context.Background(), v, newOp(v)); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	for b.Loop() {
		if len(s.VMs()) != 1000 {
			b.Fatal("wrong number")
		}
	}
}

// A full disk costs the reserve first: what must be recorded then still can be. That it is enough is
// shown where a real disk is full (test/e2e, TestHostFull).
func TestReserveIsGivenUpWhenTheDiskIsFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "banger.db")
	s := open(t, path)
	held := func() bool {
		st, err := os.Stat(path + ".reserve")
		return err == nil && st.Size() == reserveBytes
	}
	if !held() {
		t.Fatal("there is no reserve")
	}
	var pages int
	if err := s.db.QueryRow("PRAGMA page_count").Scan(&pages); err != nil {
		t.Fatal(err)
	}
	limit := func(n int) {
		t.Helper()
		if _, err := s.db.Exec(fmt.Sprintf("PRAGMA max_page_count = %d", n)); err != nil {
			t.Fatal(err)
		}
	}
	limit(pages) // SQLite then says what it says when the disk is full
	v := newVM("calm-otter")
	v.Note = strings.Repeat("x", 64<<10)
	_, err := s.AdmitVM(t.Context(), v, newOp(v))
	if !fault.Is(err, fault.Exhausted) || held() {
		t.Errorf("on a full disk: %v; reserve held: %v", err, held())
	}
	if _, found := s.VMByName("calm-otter"); found {
		t.Error("the VM is there although it was not recorded")
	}
	limit(1 << 20)
	if _, err := s.AdmitVM(t.Context(), v, newOp(v)); err != nil || !held() {
		t.Errorf("with room again: %v; reserve held: %v", err, held())
	}
}
