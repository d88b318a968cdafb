package store

import (
	"context"
	"database/sql"
	"fmt"
	"os"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// migrations bring a database from PRAGMA user_version i to i+1. Entries are never edited once
// released: only appended to.
var migrations = []string{
	`
CREATE TABLE meta (
  key   TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT;
CREATE TABLE vms (
  id   TEXT PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  slot INTEGER NOT NULL UNIQUE,
  cid  INTEGER NOT NULL UNIQUE,
  doc  TEXT NOT NULL
) STRICT;
CREATE TABLE steps (
  vm_id TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
  step  TEXT NOT NULL,
  state TEXT NOT NULL,
  PRIMARY KEY (vm_id, step)
) STRICT, WITHOUT ROWID;
CREATE TABLE operations (
  id    TEXT PRIMARY KEY,
  vm_id TEXT NOT NULL,
  seq   INTEGER NOT NULL UNIQUE,
  state TEXT NOT NULL,
  doc   TEXT NOT NULL
) STRICT;
CREATE INDEX operations_state ON operations(state);
CREATE TABLE images (
  id   TEXT PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  doc  TEXT NOT NULL
) STRICT;
CREATE TABLE kernels (
  id  TEXT PRIMARY KEY,
  doc TEXT NOT NULL
) STRICT;
`,
	// VMs that run from before there were networks have no record of that step, for which the next daemon would take
	// them down. What has been given a guest config was through the network's step, or is on none.
	`
INSERT INTO steps(vm_id, step, state)
SELECT vm_id, 'network', 'ready' FROM steps WHERE step = 'guest config'
ON CONFLICT DO NOTHING;
`,
}

// migrate applies what is missing, each step in its own transaction, after a copy of a database
// that holds anything was put beside it. A newer schema is refused: an older daemon must not
// guess at what it does not know.
func migrate(ctx context.Context, db *sql.DB, path string) error {
	var have int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&have); err != nil {
		return fault.Wrap(err, fault.Corrupt, path, "the state database cannot be read").
			WithHint("a copy from before the last upgrade may lie beside it (banger.db.v*.bak)")
	}
	if have > len(migrations) {
		return fault.New(fault.VersionSkew, path,
			"the state database has schema %d, this bangerd knows up to %d: it was written by a newer banger", have, len(migrations)).
			WithHint("upgrade banger, or point BANGER_STATE_DIR at another directory")
	}
	if have > 0 && have < len(migrations) {
		backup := fmt.Sprintf("%s.v%d.bak", path, have)
		if _, err := os.Stat(backup); os.IsNotExist(err) {
			// VACUUM INTO writes a consistent copy, the write-ahead log included (sqlite.org/lang_vacuum).
			if _, err := db.ExecContext(ctx, "VACUUM INTO ?", backup); err != nil {
				return fault.Wrap(err, fault.Internal, backup, "the state database could not be backed up before its upgrade")
			}
		}
	}
	for v := have; v < len(migrations); v++ {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, migrations[v]); err != nil {
			_ = tx.Rollback()
			return fault.Wrap(err, fault.Internal, path, "upgrading the state database to schema %d failed", v+1)
		}
		if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", v+1)); err != nil {
			_ = tx.Rollback()
			return err
		}
		if err := tx.Commit(); err != nil {
			return err
		}
	}
	return nil
}
