// Package store owns banger.db: the records of VMs, their step journal, operations, images and
// kernels. It is the one place that writes SQL.
//
// Records of VMs are also held in memory, written through: one daemon owns a database (internal/daemon
// holds the lock), so reading never costs a query and a list of a thousand VMs no disk. The store
// decides nothing: allocation in AdmitVM is the only rule it knows.
package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"net/url"
	"slices"
	"strings"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"

	sqlite "modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// Store is an open database. Safe for concurrent use.
type Store struct {
	db           *sql.DB
	installation string

	// changed is told every committed change of a VM record; deleted ones by id.
	changed func(v vm.VM)
	// imagesChanged is told that there was a change of the images' records.
	imagesChanged func()
	deleted       func(id vm.ID)

	// atCommit is called before and after every commit; the crash test ends the process in it.
	atCommit func()

	// write serialises writers, so that memory changes in the order of commits. It guards reserve.
	write   sync.Mutex
	reserve *reserve

	mu     sync.RWMutex
	vms    map[vm.ID]vm.VM
	byName map[string]vm.ID
	steps  map[vm.ID]map[string]lifecycle.StepState
	slots  bitmap // taken lease slots
	opSeq  int64
}

// Open opens or makes the database at path and brings its schema up to date.
// fault.VersionSkew if a newer banger wrote it, fault.Corrupt if it cannot be read.
func Open(ctx context.Context, path string) (*Store, error) {
	// Pragmas belong into the DSN: set on one connection they would not hold for the pool's others.
	// FULL: a record that says what exists must not be lost to a power cut (sqlite.org/pragma).
	q := url.Values{"_txlock": {"immediate"}}
	for _, p := range []string{"journal_mode(WAL)", "synchronous(FULL)", "busy_timeout(5000)", "foreign_keys(1)"} {
		q.Add("_pragma", p)
	}
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath()+"?"+q.Encode())
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, path, "the state database cannot be opened")
	}
	// One connection: writers are serialised anyway, and reads come from memory.
	db.SetMaxOpenConns(1)
	s := &Store{db: db, changed: func(vm.VM) {}, deleted: func(vm.ID) {}, imagesChanged: nothing, atCommit: nothing, reserve: openReserve(path)}
	if err := s.load(ctx, path); err != nil {
		_ = db.Close()
		return nil, err
	}
	return s, nil
}

func (s *Store) load(ctx context.Context, path string) error {
	if err := migrate(ctx, s.db, path); err != nil {
		return err
	}
	id, err := s.Meta(ctx, "installation")
	if err != nil {
		return err
	}
	if id == "" {
		var b [6]byte
		_, _ = rand.Read(b[:])
		id = hex.EncodeToString(b[:])
		if err := s.SetMeta(ctx, "installation", id); err != nil {
			return err
		}
	}
	s.installation = id
	s.vms, s.byName = map[vm.ID]vm.VM{}, map[string]vm.ID{}
	s.steps = map[vm.ID]map[string]lifecycle.StepState{}
	rows, err := s.db.QueryContext(ctx, "SELECT doc FROM vms")
	if err != nil {
		return corrupt(err, path)
	}
	vms, err := scanDocs[vm.VM](rows)
	if err != nil {
		return corrupt(err, path)
	}
	for _, v := range vms {
		s.vms[v.ID] = v
		s.byName[v.Name] = v.ID
		s.slots.set(v.Lease.Slot)
	}
	rows, err = s.db.QueryContext(ctx, "SELECT vm_id, step, state FROM steps")
	if err != nil {
		return corrupt(err, path)
	}
	defer rows.Close()
	for rows.Next() {
		var id, step, state string
		if err := rows.Scan(&id, &step, &state); err != nil {
			return corrupt(err, path)
		}
		s.setStep(vm.ID(id), lifecycle.StepRecord{Step: step, State: lifecycle.StepState(state)})
	}
	if err := rows.Err(); err != nil {
		return corrupt(err, path)
	}
	return s.db.QueryRowContext(ctx, "SELECT coalesce(max(seq), 0) FROM operations").Scan(&s.opSeq)
}

func corrupt(err error, path string) error {
	return fault.Wrap(err, fault.Corrupt, path, "the state database cannot be read").
		WithHint("keep the file; move it aside to start afresh (disks under vms/ are never deleted without a record)")
}

// Close closes the database.
func (s *Store) Close() error { return s.db.Close() }

// InstallationID names this state directory: 12 hex digits, made with the database. Every host
// resource carries it, and only resources that carry it are ever touched.
func (s *Store) InstallationID() string { return s.installation }

// Subscribe sets who is told of committed changes, in order. Call it once, before the first change;
// the functions must not block and must not call the store.
func (s *Store) Subscribe(changed func(vm.VM), deleted func(vm.ID)) {
	s.changed, s.deleted = changed, deleted
}

// SubscribeImages sets who is told, after its commit, of each change of the images' records. Call it before the
// store is used by several goroutines.
func (s *Store) SubscribeImages(changed func()) { s.imagesChanged = changed }

// AtCommit sets what is called before and after every commit. For tests that end the process there.
func (s *Store) AtCommit(f func()) { s.atCommit = f }

// Meta returns a value of the meta table, "" if there is none.
func (s *Store) Meta(ctx context.Context, key string) (string, error) {
	var v string
	err := s.db.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = ?", key).Scan(&v)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return v, err
}

// SetMeta sets a value of the meta table.
func (s *Store) SetMeta(ctx context.Context, key, value string) error {
	_, err := s.db.ExecContext(ctx, "INSERT INTO meta(key, value) VALUES(?, ?) ON CONFLICT(key) DO UPDATE SET value = excluded.value", key, value)
	return err
}

// tx runs fn in one transaction under the write lock, then apply to change memory, then notify
// still under the write lock, so that watchers see changes in the order of commits. On a full disk
// fn is run once more, with the reserve given up.
func (s *Store) tx(ctx context.Context, fn func(*sql.Tx) error, apply, notify func()) error {
	s.write.Lock()
	defer s.write.Unlock()
	err := s.commit(ctx, fn)
	if diskFull(err) && s.reserve.release() {
		err = s.commit(ctx, fn)
	}
	if err != nil {
		return storeFault(err)
	}
	s.reserve.restore()
	s.mu.Lock()
	apply()
	s.mu.Unlock()
	notify()
	return nil
}

// commit is one try of a transaction.
func (s *Store) commit(ctx context.Context, fn func(*sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := fn(tx); err != nil {
		_ = tx.Rollback()
		if ctx.Err() != nil {
			return ctx.Err() // SQLite calls it an interrupt
		}
		return err
	}
	s.atCommit()
	if err := tx.Commit(); err != nil {
		return err
	}
	s.atCommit()
	return nil
}

func nothing() {}

// diskFull says whether SQLite found no room: for the database or the log (SQLITE_FULL), or for the
// log's index (SQLITE_IOERR_SHMSIZE).
func diskFull(err error) bool {
	var se *sqlite.Error
	return errors.As(err, &se) && (se.Code()&0xff == sqlite3.SQLITE_FULL || se.Code() == sqlite3.SQLITE_IOERR_SHMSIZE)
}

// storeFault gives SQLite's own errors a code and a hint; faults pass through.
func storeFault(err error) error {
	var f *fault.Error
	if errors.As(err, &f) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if diskFull(err) {
		return fault.Wrap(err, fault.Exhausted, "state database", "the disk is full").
			WithHint("free some space and try again; nothing was changed")
	}
	return fault.Wrap(err, fault.Internal, "state database", "writing failed")
}

// AdmitVM takes a VM and the operation that makes it into the database in one transaction and
// allocates its lease: the smallest free slot and a random context id. fault.Exists if the name is taken.
func (s *Store) AdmitVM(ctx context.Context, v vm.VM, op operation.Operation) (vm.VM, error) {
	err := s.tx(ctx, func(tx *sql.Tx) error {
		if err := s.allocate(ctx, tx, &v); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO vms(id, name, slot, cid, doc) VALUES(?, ?, ?, ?, ?)",
			v.ID, v.Name, v.Lease.Slot, v.Lease.CID, mustJSON(v))
		var se *sqlite.Error
		if errors.As(err, &se) && se.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE && strings.Contains(se.Error(), "vms.name") {
			return fault.New(fault.Exists, v.Name, "a VM of this name exists").
				WithHint("choose another --name, enter it with `banger vm ssh %s`, or delete it with `banger vm delete %s`", v.Name, v.Name)
		}
		if err != nil {
			return err
		}
		return s.putOperation(ctx, tx, op)
	}, func() {
		s.vms[v.ID] = v
		s.byName[v.Name] = v.ID
		s.slots.set(v.Lease.Slot)
	}, func() { s.changed(v) })
	return v, err
}

func (s *Store) allocate(ctx context.Context, tx *sql.Tx, v *vm.VM) error {
	// From memory: a query for a gap looks at every VM, and a create is to cost the same with each.
	v.Lease.Slot = s.slots.firstClear()
	for {
		var b [4]byte
		_, _ = rand.Read(b[:])
		// 2^16 to 2^31: clear of the reserved ids and of small ones that people pick by hand.
		cid := binary.LittleEndian.Uint32(b[:])&0x7fffffff | 0x10000
		var taken int
		if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM vms WHERE cid = ?", cid).Scan(&taken); err != nil {
			return err
		}
		if taken == 0 {
			v.Lease.CID = cid
			return nil
		}
	}
}

// Save implements lifecycle.Journal: the record and its journal entries in one transaction. An
// absent entry removes the step's record. fault.NotFound if the VM has no record any more.
func (s *Store) Save(ctx context.Context, v vm.VM, steps ...lifecycle.StepRecord) error {
	return s.tx(ctx, func(tx *sql.Tx) error { return s.saveTx(ctx, tx, v, steps) },
		func() { s.applySave(v, steps) }, func() { s.changed(v) })
}

func (s *Store) saveTx(ctx context.Context, tx *sql.Tx, v vm.VM, steps []lifecycle.StepRecord) error {
	res, err := tx.ExecContext(ctx, "UPDATE vms SET name = ?, doc = ? WHERE id = ?", v.Name, mustJSON(v), v.ID)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil {
		return err
	} else if n == 0 {
		return fault.New(fault.NotFound, v.Name, "the VM has no record any more")
	}
	for _, st := range steps {
		if st.State == lifecycle.Absent {
			_, err = tx.ExecContext(ctx, "DELETE FROM steps WHERE vm_id = ? AND step = ?", v.ID, st.Step)
		} else {
			_, err = tx.ExecContext(ctx, "INSERT INTO steps(vm_id, step, state) VALUES(?, ?, ?) ON CONFLICT DO UPDATE SET state = excluded.state",
				v.ID, st.Step, st.State)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) applySave(v vm.VM, steps []lifecycle.StepRecord) {
	if old, ok := s.vms[v.ID]; ok && old.Name != v.Name {
		delete(s.byName, old.Name)
	}
	s.vms[v.ID] = v
	s.byName[v.Name] = v.ID
	for _, st := range steps {
		s.setStep(v.ID, st)
	}
}

func (s *Store) setStep(id vm.ID, st lifecycle.StepRecord) {
	m := s.steps[id]
	if m == nil {
		m = map[string]lifecycle.StepState{}
		s.steps[id] = m
	}
	if st.State == lifecycle.Absent {
		delete(m, st.Step)
	} else {
		m[st.Step] = st.State
	}
}

// Steps implements lifecycle.Journal: what is recorded of a VM's steps. Absent ones are not in it.
func (s *Store) Steps(_ context.Context, id vm.ID) (map[string]lifecycle.StepState, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make(map[string]lifecycle.StepState, len(s.steps[id]))
	for k, v := range s.steps[id] {
		out[k] = v
	}
	return out, nil
}

// Forget implements lifecycle.Journal: removes the VM's record and journal. Fine if it is gone.
func (s *Store) Forget(ctx context.Context, id vm.ID) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM vms WHERE id = ?", id)
		return err
	}, func() {
		if v, ok := s.vms[id]; ok {
			delete(s.byName, v.Name)
			s.slots.clear(v.Lease.Slot)
		}
		delete(s.vms, id)
		delete(s.steps, id)
	}, func() { s.deleted(id) })
}

// FreeSlots returns the n smallest slots that no VM has: those that the next VMs will get.
func (s *Store) FreeSlots(n int) []int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]int, 0, n)
	for slot := 0; len(out) < n; slot++ {
		if !s.slots.has(slot) {
			out = append(out, slot)
		}
	}
	return out
}

// VM returns a record by id.
func (s *Store) VM(id vm.ID) (vm.VM, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v, ok := s.vms[id]
	return v, ok
}

// VMByName returns a record by name.
func (s *Store) VMByName(name string) (vm.VM, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v, ok := s.vms[s.byName[name]]
	return v, ok
}

// VMs returns all records, oldest first.
func (s *Store) VMs() []vm.VM {
	s.mu.RLock()
	out := make([]vm.VM, 0, len(s.vms))
	for _, v := range s.vms {
		out = append(out, v)
	}
	s.mu.RUnlock()
	slices.SortFunc(out, func(a, b vm.VM) int {
		if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(string(a.ID), string(b.ID))
	})
	return out
}

// opDoc is how an operation is stored: its fault does not marshal by itself.
type opDoc struct {
	operation.Operation
	Fault *faultDoc `json:"fault,omitempty"`
}

type faultDoc struct {
	Code    fault.Code `json:"code"`
	Op      string     `json:"op,omitempty"`
	Subject string     `json:"subject,omitempty"`
	Message string     `json:"message"`
	Hint    string     `json:"hint,omitempty"`
	Cause   string     `json:"cause,omitempty"`
}

// keepOperations is how many ended operations stay on record.
const keepOperations = 200

// SaveOperation records an operation, new or changed. Only the latest ended ones are kept.
func (s *Store) SaveOperation(ctx context.Context, op operation.Operation) error {
	return s.tx(ctx, func(tx *sql.Tx) error { return s.putOperation(ctx, tx, op) }, nothing, nothing)
}

func (s *Store) putOperation(ctx context.Context, tx *sql.Tx, op operation.Operation) error {
	doc := opDoc{Operation: op}
	if f := op.Fault; f != nil {
		doc.Fault = &faultDoc{Code: f.Code, Op: f.Op, Subject: f.Subject, Message: f.Message, Hint: f.Hint}
		if f.Cause != nil {
			doc.Fault.Cause = f.Cause.Error()
		}
	}
	s.opSeq++ // under the write lock
	_, err := tx.ExecContext(ctx, `INSERT INTO operations(id, vm_id, seq, state, doc) VALUES(?, ?, ?, ?, ?)
		ON CONFLICT(id) DO UPDATE SET state = excluded.state, doc = excluded.doc`, op.ID, op.VMID, s.opSeq, op.State, mustJSON(doc))
	if err != nil || op.State == operation.Running {
		return err
	}
	// By counting, not by seq: each operation has taken at least two numbers by the time it ends.
	_, err = tx.ExecContext(ctx, `DELETE FROM operations WHERE state <> 'running' AND seq <=
		(SELECT seq FROM operations WHERE state <> 'running' ORDER BY seq DESC LIMIT 1 OFFSET ?)`, keepOperations)
	return err
}

// Operations returns the recorded operations, newest first.
func (s *Store) Operations(ctx context.Context) ([]operation.Operation, error) {
	rows, err := s.db.QueryContext(ctx, "SELECT doc FROM operations ORDER BY seq DESC")
	if err != nil {
		return nil, storeFault(err)
	}
	docs, err := scanDocs[opDoc](rows)
	if err != nil {
		return nil, storeFault(err)
	}
	out := make([]operation.Operation, len(docs))
	for i, d := range docs {
		out[i] = d.Operation
		if f := d.Fault; f != nil {
			out[i].Fault = &fault.Error{Code: f.Code, Op: f.Op, Subject: f.Subject, Message: f.Message, Hint: f.Hint}
			if f.Cause != "" {
				out[i].Fault.Cause = errors.New(f.Cause)
			}
		}
	}
	return out, nil
}

// PutImage records an image under its name; one of the same name is replaced.
func (s *Store) PutImage(ctx context.Context, img image.Image) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "DELETE FROM images WHERE name = ?", img.Name); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO images(id, name, doc) VALUES(?, ?, ?)", img.ID, img.Name, mustJSON(img))
		return err
	}, nothing, s.imagesChanged)
}

// Images returns all images by name.
func (s *Store) Images(ctx context.Context) ([]image.Image, error) {
	rows, err := s.db.QueryContext(ctx, "SELECT doc FROM images ORDER BY name")
	if err != nil {
		return nil, storeFault(err)
	}
	return scanDocs[image.Image](rows)
}

// DeleteImage removes an image's record by name. Fine if there is none.
func (s *Store) DeleteImage(ctx context.Context, name string) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM images WHERE name = ?", name)
		return err
	}, nothing, s.imagesChanged)
}

// PutKernel records a kernel.
func (s *Store) PutKernel(ctx context.Context, k image.Kernel) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "INSERT INTO kernels(id, doc) VALUES(?, ?) ON CONFLICT(id) DO UPDATE SET doc = excluded.doc", k.ID, mustJSON(k))
		return err
	}, nothing, nothing)
}

// Kernels returns all kernels.
func (s *Store) Kernels(ctx context.Context) ([]image.Kernel, error) {
	rows, err := s.db.QueryContext(ctx, "SELECT doc FROM kernels ORDER BY id")
	if err != nil {
		return nil, storeFault(err)
	}
	return scanDocs[image.Kernel](rows)
}

// DeleteKernel removes a kernel's record. Fine if there is none.
func (s *Store) DeleteKernel(ctx context.Context, id string) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM kernels WHERE id = ?", id)
		return err
	}, nothing, nothing)
}

func scanDocs[T any](rows *sql.Rows) ([]T, error) {
	defer rows.Close()
	var out []T
	for rows.Next() {
		var doc []byte
		if err := rows.Scan(&doc); err != nil {
			return nil, err
		}
		var v T
		if err := json.Unmarshal(doc, &v); err != nil {
			return nil, fmt.Errorf("a record does not parse: %w", err)
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// mustJSON marshals records of ours, which hold nothing that json refuses.
func mustJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// bitmap is a set of small numbers. The zero value is empty.
type bitmap []uint64

func (b *bitmap) set(n int) {
	for len(*b) <= n/64 {
		*b = append(*b, 0)
	}
	(*b)[n/64] |= 1 << (n % 64)
}

func (b bitmap) clear(n int) { b[n/64] &^= 1 << (n % 64) }

func (b bitmap) has(n int) bool { return n/64 < len(b) && b[n/64]&(1<<(n%64)) != 0 }

// firstClear is the smallest number that is not in the set.
func (b bitmap) firstClear() int {
	for i, word := range b {
		if word != math.MaxUint64 {
			return i*64 + bits.TrailingZeros64(^word)
		}
	}
	return len(b) * 64
}
