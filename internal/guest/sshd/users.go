package sshd

import (
	"bytes"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// ownKeys are the keys of the host's user, for every user of the guest. The host writes them at each start.
const ownKeys = "/etc/ssh/banger_authorized_keys"

// maxKeys bounds an authorized_keys file, in bytes.
const maxKeys = 1 << 20

// allowed looks the key up in the host's file and in the user's own.
func allowed(name string, key ssh.PublicKey) bool {
	u, err := user.Lookup(name)
	if err != nil && name != "root" {
		return false
	}
	if holds(ownKeys, 0, key) {
		return true
	}
	if err != nil { // an image without users has root all the same
		return false
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	return err == nil && holds(filepath.Join(u.HomeDir, ".ssh", "authorized_keys"), uint32(uid), key)
}

// holds says whether an authorized_keys file, which nobody but root and its user may have written, has a key.
func holds(path string, uid uint32, key ssh.PublicKey) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() || st.Mode().Perm()&0o022 != 0 {
		return false
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; owner != 0 && owner != uid {
		return false
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeys))
	return err == nil && hasKey(text, key)
}

func hasKey(text []byte, key ssh.PublicKey) bool {
	want := key.Marshal()
	for len(text) > 0 {
		have, _, options, rest, err := ssh.ParseAuthorizedKey(text)
		if err != nil {
			return false // no further key
		}
		if len(options) == 0 && bytes.Equal(have.Marshal(), want) {
			return true
		}
		text = rest
	}
	return false
}

// userOf is how the agent's code is told of a user: root of an image that lists no users by number.
func userOf(name string) string {
	if _, err := user.Lookup(name); err != nil && name == "root" {
		return "0"
	}
	return name
}

// shellOf is the last field of a user's line in /etc/passwd (passwd(5)); /bin/sh if there is none.
func shellOf(name string) string {
	text, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return "/bin/sh"
	}
	return shellIn(string(text), name)
}

func shellIn(passwd, name string) string {
	for line := range strings.Lines(passwd) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) == 7 && f[0] == name && f[6] != "" {
			return f[6]
		}
	}
	return "/bin/sh"
}

// ServeFiles speaks SFTP until the client is done. It runs as the user, so that the kernel says what they may do.
func ServeFiles(in io.Reader, out io.WriteCloser) error {
	s, err := sftp.NewServer(stream{in, out})
	if err != nil {
		return err
	}
	return s.Serve()
}

// stream is both directions in one.
type stream struct {
	io.Reader
	io.WriteCloser
}
