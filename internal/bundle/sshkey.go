package bundle

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/crypto/ssh"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// keyComment marks the public key in a guest's authorized_keys.
const keyComment = "banger"

// EnsureSSHKey sees to it that dir holds id_ed25519 (0600) and id_ed25519.pub. A key that is there is kept for
// good: running guests know it. One that cannot be read as a key is fault.Corrupt and is not overwritten.
func EnsureSSHKey(dir string) error {
	file := filepath.Join(dir, FileName(SSHKey))
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		if raw, err = newKey(); err != nil {
			return fault.Wrap(err, fault.Internal, file, "cannot be made")
		}
		if err := replaceFile(file, raw, 0o600); err != nil {
			return err
		}
	} else if err != nil {
		return fault.Wrap(err, fault.Permission, file, "cannot be read")
	}
	signer, err := ssh.ParsePrivateKey(raw)
	if err != nil {
		return fault.Wrap(err, fault.Corrupt, file, "is not an SSH private key").
			WithHint("move it away and run the same command again: a new key is made; running VMs know the old one until they are restarted")
	}
	if err := os.Chmod(file, 0o600); err != nil {
		return fault.Wrap(err, fault.Permission, file, "cannot be made private")
	}
	pub := ssh.MarshalAuthorizedKey(signer.PublicKey())
	pub = append(pub[:len(pub)-1], " "+keyComment+"\n"...)
	if old, err := os.ReadFile(file + ".pub"); err == nil && string(old) == string(pub) {
		return nil
	}
	return replaceFile(file+".pub", pub, 0o644)
}

// making keeps two callers of KeyFor from making a key each.
var making sync.Mutex

// KeyFor gives the file of the private key by which this user enters sandboxes: the bundle's, or one in dir where the bundle is the
// system's, because it lists none (a package's) or belongs to another user (installed by root for everybody). That one is made
// when it is first asked for and kept for good. Safe for concurrent use by one process.
func (b *Bundle) KeyFor(dir string) (string, error) {
	if b.hasKey() {
		return b.Path(SSHKey), nil
	}
	making.Lock()
	defer making.Unlock()
	if err := EnsureSSHKey(dir); err != nil {
		return "", err
	}
	return filepath.Join(dir, FileName(SSHKey)), nil
}

// hasKey says whether the bundle's key is for this user. A key that is missing or damaged counts: that is to be told, not to be worked around
// by another key, which VMs that run do not know.
func (b *Bundle) hasKey() bool {
	if _, ok := b.Artifacts[SSHKey]; !ok {
		return false
	}
	info, err := os.Stat(b.dir)
	if err != nil {
		return true
	}
	sys, ok := info.Sys().(*syscall.Stat_t)
	return !ok || os.Geteuid() == 0 || int(sys.Uid) == os.Geteuid() // root reads every key
}

func newKey() ([]byte, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, keyComment)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(block), nil
}
