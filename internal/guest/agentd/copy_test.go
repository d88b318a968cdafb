package agentd_test

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/files"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// TestCopy has files go both ways over both kinds of link, more than any buffer holds; the reason of a
// refusal arrives although the host is still sending.
func TestCopy(t *testing.T) {
	dir := t.TempDir()
	data := make([]byte, 16<<20)
	_, _ = rand.Read(data)
	if err := os.WriteFile(dir+"/data", data, 0o600); err != nil {
		t.Fatal(err)
	}
	g := &agentd.Guest{Stages: &agentd.Stages{}, Files: func(p string) string { return filepath.Join(dir, p) }}
	links(t, g, func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		for _, c := range []struct {
			do       func(conn files.Conn) (files.Result, error)
			at, want string
		}{
			{func(c files.Conn) (files.Result, error) {
				return files.Put(within(t), c, dir+"/data", "there", files.Options{})
			}, dir + "/there", ""},
			{func(c files.Conn) (files.Result, error) {
				return files.Get(within(t), c, "there", dir+"/back", files.Options{})
			}, dir + "/back", ""},
			{func(c files.Conn) (files.Result, error) {
				return files.Put(within(t), c, dir+"/data", "no/where", files.Options{})
			}, "", "open " + dir + "/no: no such file or directory"},
		} {
			conn, err := s.DialStream(within(t), wire.KindCopy)
			if err != nil {
				t.Fatal(err)
			}
			r, err := c.do(conn)
			if c.want != "" {
				if err == nil || err.Error() != c.want {
					t.Errorf("got %v, want %s", err, c.want)
				}
				continue
			}
			if got, readErr := os.ReadFile(c.at); err != nil || readErr != nil || !bytes.Equal(got, data) || r.Files != 1 {
				t.Errorf("%s: %+v, %v, %v", c.at, r, err, readErr)
			}
		}
	})
}
