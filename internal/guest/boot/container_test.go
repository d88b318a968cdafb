package boot_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

func TestContainer(t *testing.T) {
	want := boot.Container{Version: boot.ContainerVersion, Reference: "docker.io/library/x:1", NoInit: true, Command: []string{"/bin/x", "a b"},
		Environment: []string{"A=1", "B=two words", "LINES=a\nb", "broken", "C D=x"}, User: "app:app", WorkingDir: "/srv", StopSignal: "SIGQUIT"}
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := boot.ParseContainer(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"A": "1", "B": "two words"}, got.SessionEnvironment()); diff != "" {
		t.Error(diff)
	}
	for text, code := range map[string]fault.Code{"": fault.Corrupt, "{}": fault.Corrupt, `{"version":2}`: fault.VersionSkew, `{"version":1,"user":"a\u0000"}`: fault.Corrupt, "[1]": fault.Corrupt} {
		if _, err := boot.ParseContainer([]byte(text)); !fault.Is(err, code) || !strings.Contains(err.Error(), boot.ContainerPath) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
