package cli

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestClip(t *testing.T) {
	const table = "NAME   STATE\nweb    \x1b[32mrunning\x1b[0m\ndb     stopped\nworker stopped\n"
	for _, tt := range []struct {
		width, height uint16
		want          string
	}{
		{0, 0, table},
		{80, 24, table},
		{13, 24, "NAME   STATE\nweb    \x1b[32mrunn…\x1b[0m\ndb     stop…\nworker stop…\n"},
		{80, 4, "NAME   STATE\nweb    \x1b[32mrunning\x1b[0m\n… 2 more\n"},
		{80, 5, table},
		{4, 3, "NA…\n… …\n"},
		{80, 2, table}, // no screen to speak of
	} {
		if got := clip(table, unix.Winsize{Col: tt.width, Row: tt.height}); got != tt.want {
			t.Errorf("%dx%d: %q, want %q", tt.width, tt.height, got, tt.want)
		}
	}
}
