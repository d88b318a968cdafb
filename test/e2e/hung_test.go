//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// verb is a command about a guest in trouble, and how it must end: within a bound, with a code, and with words that say what is
// the matter.
type verb struct {
	args  []string
	most  time.Duration
	codes []int
	words []string
}

func (h *host) verbs(all []verb) {
	h.t.Helper()
	for _, v := range all {
		r := h.try(v.args...)
		said := r.stdout + r.stderr
		h.t.Logf("%5.1fs  exit %d  %s: %s", r.took.Seconds(), r.code, r.command, strings.TrimSpace(firstOf(r.stderr)))
		ok := false
		for _, code := range v.codes {
			ok = ok || r.code == code
		}
		if !ok || r.took > v.most {
			h.t.Errorf("%s\nwant one of the exit codes %v within %v", r, v.codes, v.most)
		}
		for _, w := range v.words {
			if !strings.Contains(said, w) {
				h.t.Errorf("%s\ndoes not say %q", r, w)
			}
		}
	}
}

// session runs a command that does not end, and gives the first line that is then said on stderr.
func (h *host) session(name string) (*exec.Cmd, <-chan string) {
	h.t.Helper()
	cmd := h.command(h.t.Context(), "vm", "exec", name, "--", "sh", "-c", "echo begun; sleep 1000")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "begun\n" {
		h.t.Fatalf("%q, %v", line, err)
	}
	told := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(stderr).ReadString('\n') // what came before an error is what is looked at
		told <- line
	}()
	return cmd, told
}

// firstOf is the first line of a message, without its hint.
func firstOf(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// TestGuestInTrouble is one VM whose guest runs out of disk, then of memory, then thrashes, and then hangs: every verb ends within its bound, and says what it waited
// for. Before that it has a container, which takes a guest that is well.
func TestGuestInTrouble(t *testing.T) {
	slow(t)
	h := newHost(t, `stop_timeout = "20s"`)
	const name = "ill"
	h.create(name, "--system-size", "2G", "--disk-size", "1G")

	t.Run("ports of a container", func(t *testing.T) {
		h := h.with(t)
		program, err := os.ReadFile(static(t, services))
		if err != nil {
			t.Fatal(err)
		}
		if r := h.tryInput(string(program), "vm", "exec", name, "--", "sh", "-c", "mkdir -p /run/image/etc && cat > /run/image/services && chmod +x /run/image/services"); r.code != 0 {
			t.Fatal(r)
		}
		h.do("vm", "exec", name, "--", "sh", "-c", "tar -C /run/image -c . | docker import - services:test && docker run --detach --name page --publish 18080:8080 --publish 15353:5353/udp services:test /services")
		h.until("the page answers through the container's port", callTime, func() bool {
			return strings.Contains(h.do("vm", "ports", name), "http 200 Hello there")
		})
		out := h.do("vm", "ports", name)
		for _, want := range []string{"18080/tcp", "15353/udp", "docker-proxy"} {
			if !strings.Contains(out, want) {
				t.Errorf("%q is not in\n%s", want, out)
			}
		}
		h.do("vm", "exec", name, "--", "docker", "rm", "--force", "page")
		if out := h.do("vm", "ports", name); strings.Contains(out, "18080/tcp") {
			t.Errorf("the port of a container that is gone:\n%s", out)
		}
	})

	file := filepath.Join(t.TempDir(), "file")
	write(t, file, strings.Repeat("0123456789abcdef", 1<<16)) // 1 MiB

	t.Run("disk full", func(t *testing.T) {
		h := h.with(t)
		h.do("vm", "exec", name, "--", "sh", "-c", `for d in / /root/; do fallocate -l $(df --output=avail -B1 $d | tail -n 1) $d/fill; dd if=/dev/zero of=$d/more bs=1M 2>/dev/null; done; true`)
		h.verbs([]verb{
			{[]string{"vm", "exec", name, "--", "true"}, callTime, []int{0}, nil},
			{[]string{"vm", "cp", file, name + ":/root/copy"}, callTime, []int{2}, []string{"in the guest", "no space left on device"}},
			{[]string{"vm", "cp", file, name + ":/copy"}, callTime, []int{2}, []string{"in the guest", "no space left on device"}},
			{[]string{"vm", "stats", name}, callTime, []int{0}, nil},
			{[]string{"vm", "ports", name}, callTime, []int{0}, []string{"22/tcp"}},
			{[]string{"vm", "ssh", name, "--", "true"}, callTime, []int{0}, nil},
			{[]string{"vm", "set", name, "--disk-size", "2G"}, callTime, []int{0}, nil}, // which is the way out
			{[]string{"vm", "cp", file, name + ":/root/copy"}, callTime, []int{0}, nil},
		})
		h.do("vm", "exec", name, "--", "sh", "-c", "rm -f /fill /more /root/fill /root/more /root/copy")
	})

	t.Run("memory exhausted", func(t *testing.T) {
		h := h.with(t)
		// Memory that no process has cannot be had back by ending one.
		h.do("vm", "exec", name, "--", "sh", "-c", `mkdir -p /run/eaten && mount -t tmpfs -o size=2G tmpfs /run/eaten
			while [ "$(awk '/^MemAvailable/{print $2}' /proc/meminfo)" -gt 40960 ]; do dd if=/dev/zero of=/run/eaten/$(date +%N) bs=1M count=16 2>/dev/null; done`)
		h.verbs([]verb{
			{[]string{"vm", "stats", name}, callTime, []int{0}, nil},
			{[]string{"vm", "ports", name}, callTime, []int{0}, nil},
			{[]string{"vm", "exec", name, "--", "true"}, callTime, []int{0, 137}, nil}, // it may be what the kernel ends
			{[]string{"vm", "cp", file, name + ":/root/copy"}, callTime, []int{0}, nil},
			{[]string{"vm", "show", name}, callTime, []int{0}, []string{"running"}},
		})
		h.do("vm", "exec", name, "--", "umount", "/run/eaten")
	})

	t.Run("thrashing", func(t *testing.T) {
		h := h.with(t)
		h.sh(name, "echo kept > /root/kept && dd if=/dev/zero of=/root/hot bs=1M count=300 2>/dev/null && sync")
		// There is no swap: memory goes to a file of tmpfs, and what is left for the page cache is too little for a file that several
		// processes read all over, all the time.
		h.sh(name, `nohup sh -c 'mkdir -p /run/eaten && mount -t tmpfs -o size=4G tmpfs /run/eaten
			while [ "$(awk "/^MemAvailable/{print \$2}" /proc/meminfo)" -gt 81920 ]; do dd if=/dev/zero of=/run/eaten/$(date +%N) bs=1M count=16; done
			for i in 1 2 3 4; do
				python3 -c "import mmap, os, random
m = mmap.mmap(os.open(\"/root/hot\", os.O_RDONLY), 0, prot=mmap.PROT_READ)
while True: m[random.randrange(len(m))]" &
			done
			while :; do cat /proc/pressure/memory > /dev/console; sleep 2; done' > /dev/null 2>&1 &`)
		h.until("it thrashes", 3*time.Minute, func() bool {
			waited := strings.Split(h.do("vm", "logs", name), "some avg10=")
			var percent float64 // of ten seconds, in which some process waited for memory (Documentation/accounting/psi.rst)
			_, _ = fmt.Sscanf(waited[len(waited)-1], "%f ", &percent)
			return percent > 10
		})
		// Who answers and who does not is the guest's affair. Here a call ends, and says why if it was in vain.
		h.verbs([]verb{
			{[]string{"vm", "list"}, 2 * time.Second, []int{0}, []string{name}},
			{[]string{"vm", "show", name}, 10 * time.Second, []int{0}, []string{"running"}},
			{[]string{"vm", "stats", name}, 15 * time.Second, []int{0, 1, 6}, nil},
			{[]string{"vm", "ports", name}, 15 * time.Second, []int{0, 1, 6}, nil},
			{[]string{"vm", "exec", name, "--", "true"}, 40 * time.Second, []int{0, 1, 6, 137}, nil},
			{[]string{"vm", "cp", file, name + ":/root/copy"}, 40 * time.Second, []int{0, 1, 2, 6}, nil},
			{[]string{"vm", "wait", name, "--for", "port:9", "--timeout", "3s"}, 10 * time.Second, []int{6}, []string{"port 9"}},
			{[]string{"vm", "logs", name}, 5 * time.Second, []int{0}, nil},
			{[]string{"vm", "stop", "--force", name}, 10 * time.Second, []int{0}, []string{"stopped"}},
			{[]string{"vm", "start", name}, callTime, []int{0}, nil},
			{[]string{"vm", "exec", name, "--", "cat", "/root/kept"}, callTime, []int{0}, []string{"kept"}},
		})
	})

	t.Run("an agent that hangs", func(t *testing.T) {
		h := h.with(t)
		open, told := h.session(name) // that is told of it below
		// Its supervisor too, which would start another one for one that ended; and whoever would let it go on.
		h.do("vm", "exec", name, "--", "sh", "-c", `(sleep 2; kill -STOP $(pgrep -f ^banger-supervisor) $(pgrep -f ^banger-vsock-agent)) >/dev/null 2>&1 &`)
		h.until("it answers nothing", callTime, func() bool { return h.try("vm", "ports", name).code != 0 })
		select {
		case text := <-told:
			if !strings.Contains(text, "has not answered for") {
				t.Errorf("an open session says %q", text)
			}
		case <-time.After(callTime):
			t.Error("an open session is told nothing")
		}
		began := time.Now()
		if err := open.Process.Signal(syscall.SIGINT); err != nil {
			t.Error(err)
		}
		_ = open.Wait() // its code is looked at
		if took := time.Since(began); took > 3*time.Second || open.ProcessState.ExitCode() != 130 {
			t.Errorf("Ctrl-C ended it after %s: %v", took, open.ProcessState)
		}
		h.verbs([]verb{
			{[]string{"vm", "list"}, 2 * time.Second, []int{0}, []string{name}},
			{[]string{"vm", "show", name}, 10 * time.Second, []int{0}, []string{"does not answer"}},
			{[]string{"vm", "stats", name}, 15 * time.Second, []int{0, 6, 1}, []string{"agent"}},
			{[]string{"vm", "ports", name}, 15 * time.Second, []int{6}, []string{"agent", "did not answer in time"}},
			{[]string{"vm", "exec", name, "--", "true"}, 40 * time.Second, []int{6}, []string{"agent"}},
			{[]string{"vm", "cp", file, name + ":"}, 40 * time.Second, []int{6}, []string{"agent"}},
			{[]string{"vm", "trim", name}, 15 * time.Second, []int{6}, []string{"agent"}},
			{[]string{"vm", "wait", name, "--for", "port:22", "--timeout", "3s"}, 10 * time.Second, []int{6}, []string{"port 22"}},
			{[]string{"vm", "set", name, "--disk-size", "3G"}, 40 * time.Second, []int{0, 1, 6}, nil},
			{[]string{"vm", "logs", name}, 5 * time.Second, []int{0}, nil},
			{[]string{"vm", "stop", name}, 40 * time.Second, []int{0}, []string{"stopped"}},
			{[]string{"vm", "show", name}, 5 * time.Second, []int{0}, []string{"forced off"}},
		})
	})
	h.do("vm", "delete", name)
}
