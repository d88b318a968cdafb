package sandbox

import (
	"context"
	"errors"
	"os"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/store"
)

// Open opens the state database of o.Paths, makes a Service over it and reconciles. The caller
// holds the lock of the state directory. Close closes the database as well.
func Open(ctx context.Context, o Options) (*Service, error) {
	st, err := store.Open(ctx, o.Paths.Database())
	if err != nil {
		return nil, err
	}
	s := New(st, o)
	if err := s.Reconcile(ctx, bootID()); err != nil {
		return nil, errors.Join(err, s.Close(context.WithoutCancel(ctx)))
	}
	return s, nil
}

// bootID identifies this boot of the host: random(4), /proc/sys/kernel/random/boot_id.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "" // no proc: then no reboot can be told, and VMMs are looked for one by one
	}
	return strings.TrimSpace(string(b))
}
