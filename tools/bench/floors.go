package main

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // the store floor is a transaction of the same engine
)

// floors are the bare costs that a create cannot do without. Each sample of a figure is taken between
// two samples of the floors, so that what disturbs one disturbs both.
type floors struct {
	dir    string
	db     *sql.DB
	blank  string // the template of system disks
	seed   string // the work seed
	record string
}

func newFloors(dir, blank, seed string) (*floors, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "floor.db")+"?_txlock=immediate&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	if _, err := db.Exec("CREATE TABLE records (id INTEGER PRIMARY KEY, doc TEXT)"); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return &floors{dir: dir, db: db, blank: blank, seed: seed, record: strings.Repeat("x", 2000)}, nil // a VM's record is of that size
}

func (f *floors) close() error { return errors.Join(f.db.Close(), os.RemoveAll(f.dir)) }

// process starts a program that does nothing, and waits for it.
func (f *floors) process(ctx context.Context) (time.Duration, error) {
	u, err := run1(ctx, nil, "/bin/true")
	return u.Wall, err
}

// transaction replaces a record, durably.
func (f *floors) transaction(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	_, err := f.db.ExecContext(ctx, "INSERT INTO records VALUES(1, ?) ON CONFLICT DO UPDATE SET doc = excluded.doc", f.record)
	return time.Since(began), err
}

// disks copies the two files that a VM's disks are made from, as cheaply as the filesystem can, durably.
func (f *floors) disks() (time.Duration, error) {
	began := time.Now()
	for i, src := range []string{f.blank, f.seed} {
		if err := bareCopy(src, filepath.Join(f.dir, fmt.Sprint("disk", i))); err != nil {
			return 0, err
		}
	}
	took := time.Since(began)
	return took, errors.Join(os.Remove(filepath.Join(f.dir, "disk0")), os.Remove(filepath.Join(f.dir, "disk1")))
}

// bareCopy is FICLONE, or else copy_file_range(2) over the runs of data, and fsync.
func bareCopy(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return out.Sync()
	}
	st, err := in.Stat()
	if err != nil {
		return err
	}
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	for at := int64(0); ; {
		from, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return out.Sync()
		}
		if err != nil {
			return err
		}
		if at, err = unix.Seek(int(in.Fd()), from, unix.SEEK_HOLE); err != nil {
			return err
		}
		for to := from; from < at; {
			n, err := unix.CopyFileRange(int(in.Fd()), &from, int(out.Fd()), &to, int(at-from), 0)
			if err != nil {
				return err
			}
			if n == 0 {
				return fmt.Errorf("%s became shorter", src)
			}
		}
	}
}

// bareQEMU starts QEMU with the arguments of a VM that ran, and waits until its monitor answers: the
// VMM's own share of a create. The guest never runs.
func bareQEMU(ctx context.Context, dir string, argv []string) (time.Duration, error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	for _, name := range []string{"monitor", "agent"} { // descriptors 3 and 4, as the driver hands them over
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, err
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return 0, err
		}
		f, err := l.File()
		if err := errors.Join(err, l.SetDeadline(time.Now())); err != nil {
			return 0, err
		}
		l.SetUnlinkOnClose(false)
		if err := l.Close(); err != nil {
			return 0, err
		}
		files = append(files, f)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.ExtraFiles = files
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	var errs strings.Builder
	cmd.Stderr = &errs
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	took, err := func() (time.Duration, error) {
		conn, err := net.Dial("unix", filepath.Join(dir, "monitor"))
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			return 0, err
		}
		// The greeting comes before the machine is made; an answer comes after it.
		if _, err := io.WriteString(conn, `{"execute":"qmp_capabilities"} {"execute":"query-status","id":"made"}`); err != nil {
			return 0, err
		}
		for lines := bufio.NewScanner(conn); ; {
			if !lines.Scan() {
				return 0, errors.Join(io.ErrUnexpectedEOF, lines.Err())
			}
			if strings.Contains(lines.Text(), `"made"`) {
				return time.Since(began), nil
			}
		}
	}()
	_ = cmd.Process.Kill() // Wait says whether it is gone
	_ = cmd.Wait()         // killed: that is no error
	if err != nil {
		return 0, fmt.Errorf("QEMU's monitor did not answer: %w: %s", err, errs.String())
	}
	return took, nil
}
