//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/disk"
)

// services is what listens in the guest: HTTP for all, HTTPS by IPv6, UDP, and something that says nothing on
// the loopback alone.
const services = `package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"net/http"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func main() {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	form := &x509.Certificate{SerialNumber: big.NewInt(1)}
	cert := tls.Certificate{Certificate: [][]byte{must(x509.CreateCertificate(rand.Reader, form, form, &key.PublicKey, key))}, PrivateKey: key}
	must(net.ListenPacket("udp4", "0.0.0.0:5353"))
	must(net.Listen("tcp4", "127.0.0.1:9000"))
	own := must(net.Listen("tcp4", "127.0.0.9:9009"))
	plain := must(net.Listen("tcp4", "0.0.0.0:8080"))
	secure := tls.NewListener(must(net.Listen("tcp", "[::]:8443")), &tls.Config{Certificates: []tls.Certificate{cert}})
	page := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "<title>Hello \x1b[31mthere</title>") })
	go http.Serve(secure, http.NotFoundHandler())
	go http.Serve(own, http.RedirectHandler("/", http.StatusFound))
	fmt.Println("up")
	panic(http.Serve(plain, page))
}
`

// sh runs a shell command in a VM without SSH, which an emulated guest needs seconds for. It must succeed.
func (h *host) sh(name, command string) string {
	h.t.Helper()
	return strings.TrimSuffix(h.do("vm", "exec", name, "--", "sh", "-c", command), "\n")
}

// TestVerbs is what one does with a VM that runs, in one VM: a boot is what costs here. It has no network, which none of this needs.
func TestVerbs(t *testing.T) {
	h := newHost(t, `network = "none"`)
	const name = "busy"
	h.create(name, "--disk-size", "2G", "--system-size", "2G")
	h.do("vm", "wait", name, "--for", "ssh") // its init is up, too
	m := h.show(name)
	size := func(h *host, dir string) int64 {
		h.t.Helper()
		n, err := strconv.ParseInt(h.sh(name, "df --block-size 1 --output=size "+dir+" | tail -n 1 | tr -d ' '"), 10, 64)
		if err != nil {
			h.t.Fatal(err)
		}
		return n
	}
	taken := func() int64 {
		n := int64(0)
		for _, file := range []string{"work.ext4", "system.ext4"} {
			a, err := disk.Allocated(filepath.Join(m.Directory, file))
			if err != nil {
				t.Fatal(err)
			}
			n += a
		}
		return n
	}

	t.Run("set", func(t *testing.T) {
		h := h.with(t)
		h.sh(name, "echo kept > /root/kept; echo kept > /kept")
		if out := h.do("vm", "set", name, "--disk-size", "20G", "--system-size", "5G", "--label", "a=b"); out != name+": set\n" {
			t.Errorf("set printed %q", out)
		}
		for dir, want := range map[string]int64{"/root": 20 << 30, "/": 5 << 30} {
			if got := size(h, dir); got > want || got < want-want/20 {
				t.Errorf("%s has %d bytes in the guest, want about %d", dir, got, want)
			}
		}
		if got := h.sh(name, "cat /root/kept /kept"); got != "kept\nkept" {
			t.Errorf("files: %q", got)
		}
		if after := h.show(name); after.PID != m.PID || after.DiskBytes != 20<<30 {
			t.Errorf("%+v", after)
		}
		h.refused(4, []string{"vm", "set", name, "--memory", "768M"}, "memory can change only while it is stopped", "--restart")
		h.refused(2, []string{"vm", "set", name, "--disk-size", "10G"}, "cannot be made smaller")
	})

	t.Run("stats", func(t *testing.T) {
		h := h.with(t)
		var all []struct {
			Name string
			Host struct {
				CPU    float64 `json:"cpu_percent"`
				Memory int64   `json:"memory_bytes"`
			}
			Guest struct {
				CPUs   int
				CPU    float64 `json:"cpu_percent"`
				Total  int64   `json:"memory_total_bytes"`
				Free   int64   `json:"memory_available_bytes"`
				Uptime int64   `json:"uptime_ms"`
				Disks  []struct {
					Target string
					Total  int64 `json:"total_bytes"`
				}
			}
		}
		h.json(&all, "vm", "stats")
		if len(all) != 1 || all[0].Name != name {
			t.Fatalf("%+v", all)
		}
		s := all[0]
		if s.Host.Memory < 32<<20 || s.Host.Memory > 3<<30 || s.Guest.CPUs != 2 || s.Guest.Total < 700<<20 || s.Guest.Total > 1<<30 ||
			s.Guest.Free <= 0 || s.Guest.Free > s.Guest.Total || s.Guest.Uptime < 1000 || s.Guest.CPU < 0 || s.Guest.CPU > 100 || len(s.Guest.Disks) != 2 {
			t.Errorf("%+v", s)
		}
		t.Logf("%s", h.do("vm", "stats", name))
	})

	t.Run("ports", func(t *testing.T) {
		h := h.with(t)
		program, err := os.ReadFile(static(t, services))
		if err != nil {
			t.Fatal(err)
		}
		if r := h.tryInput(string(program), "vm", "exec", name, "--", "sh", "-c", "cat > /run/services && chmod +x /run/services"); r.code != 0 {
			t.Fatal(r)
		}
		h.sh(name, "systemd-run --quiet --unit services /run/services")
		h.do("vm", "wait", name, "--for", "port:8080", "--timeout", "2m")
		r := h.try("vm", "ports", name)
		t.Logf("%s", r)
		out := r.stdout
		if r.code != 0 || r.took > callTime || !strings.Contains(r.stderr, name+": it has no address: its ports cannot be reached by the network") {
			t.Errorf("%s", r)
		}
		for _, want := range []string{"5353/udp", "22/tcp", "9000/tcp  loopback only", "http 200 Hello there", "http 302", "https 404", "/run/services"} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q", want)
			}
		}
		if n := strings.Count(out, " 22/tcp"); n != 1 {
			t.Errorf("port 22 is listed %d times", n)
		}
		if strings.Contains(out, "\x1b") {
			t.Error("an escape sequence of the guest's got through")
		}
	})

	t.Run("a hundred calls at once", func(t *testing.T) {
		h := h.with(t)
		socket := strings.TrimSpace(h.do("daemon", "socket"))
		client := &http.Client{Timeout: callTime, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}}}
		defer client.CloseIdleConnections()
		// Most share what the guest answers to a few; a hundred at once at its agent are TestGuest's of internal/guest.
		began := time.Now()
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				resp, err := client.Post("http://daemon/banger.v1.VMService/GetStats", "application/json", strings.NewReader(`{"refs":["`+name+`"]}`))
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				body, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(body), `"uptimeMs"`) {
					t.Errorf("%s %.300s, %v", resp.Status, body, err)
				}
			})
		}
		all.Wait()
		t.Logf("a hundred answers after %s", time.Since(began))
	})

	t.Run("trim", func(t *testing.T) {
		if underFirecracker() {
			t.Skip("Firecracker 1.12 takes no discards")
		}
		h := h.with(t)
		h.sh(name, "head -c 128M /dev/urandom > /root/big && sync")
		full := taken()
		h.sh(name, "rm /root/big && sync")
		began := time.Now()
		r := h.try("vm", "trim", name)
		if r.code != 0 || !strings.Contains(r.stderr, "given back to the host") {
			t.Error(r)
		}
		t.Logf("trim: %s, %d MiB before, %d MiB after", time.Since(began), full>>20, taken()>>20)
		if left := taken(); left > full-100<<20 {
			t.Errorf("%d bytes before, %d after", full, left)
		}
	})

	t.Run("clock", func(t *testing.T) {
		h := h.with(t)
		// The daemon that comes next finds a guest whose clock is off.
		h.do("daemon", "stop")
		h.do("vm", "list")
		h.sh(name, "timedatectl set-ntp false 2>/dev/null; date -s 2020-01-01 > /dev/null")
		h.do("daemon", "stop")
		h.do("vm", "list")
		h.until("the guest's clock is right", callTime, func() bool {
			guest, err := strconv.ParseInt(h.sh(name, "date +%s"), 10, 64)
			return err == nil && time.Since(time.Unix(guest, 0)).Abs() < time.Minute
		})
		// That a jump of the clock is noticed is shown where it may be set: in the guest.
		test := filepath.Join(filepath.Dir(must(os.Executable())), "hostclock.test") // the lab brings it
		if !underFirecracker() {
			test = filepath.Join(t.TempDir(), "hostclock.test")
			build := exec.Command("go", "test", "-c", "-o", test, "./internal/hostclock")
			build.Dir, build.Env = checkout, append(os.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
		program, err := os.ReadFile(test)
		if err != nil {
			t.Fatal(err)
		}
		if r := h.tryInput(string(program), "vm", "exec", name, "--", "sh", "-c", "cat > /run/clock && chmod +x /run/clock && BANGER_TEST_MAY_SET_CLOCK=1 /run/clock -test.v -test.run TestJumps"); r.code != 0 || !strings.Contains(r.stdout, "--- PASS: TestJumps") {
			t.Error(r)
		}
	})

	t.Run("clock after a pause", func(t *testing.T) {
		h := h.with(t)
		h.do("daemon", "stop") // it holds QEMU's monitor
		if underFirecracker() {
			h.do("vm", "kill", "--signal", "STOP", name)
		} else {
			pause(t, filepath.Join(h.state, "run"))
		}
		time.Sleep(15 * time.Second)
		if r := h.try("vm", "exec", name, "--", "true"); r.code != 4 || !strings.Contains(r.stderr, "paused") || !strings.Contains(r.stderr, "banger vm start "+name) {
			t.Errorf("a paused guest: %s", r)
		}
		h.do("vm", "start", name)
		began := time.Now()
		off := time.Hour
		h.until("the guest's clock is right", callTime, func() bool {
			before := time.Now()
			guest, err := strconv.ParseFloat(strings.TrimSpace(h.do("vm", "exec", name, "--", "date", "+%s.%N")), 64)
			if err != nil {
				t.Fatal(err)
			}
			at := time.UnixMicro(int64(guest * 1e6))
			off = max(before.Sub(at), time.Until(at), 0)
			return off < 2*time.Second
		})
		t.Logf("right again %s after it went on, but for %s", time.Since(began), off)
	})

	t.Run("agent", func(t *testing.T) {
		h := h.with(t)
		// Nobody asks it anything meanwhile: the daemon is away, and so is this. What its threads ran is in nanoseconds
		// (Documentation/scheduler/sched-stats.rst).
		h.sh(name, `nohup sh -c 'p=$(pidof banger-vsock-agent | tr " " "\n" | sort -n | head -n 1)
			ran() { cat /proc/$p/task/*/schedstat | awk "{n += \$1} END {printf \"%.0f\", n}"; }
			for i in 1 2 3 4 5 6 7 8; do a=$(ran); sleep 5; echo ran $(($(ran) - a)) ns; done
			awk "/^Rss|^VmRSS/ {print \$1, \$2}" /proc/$p/status' > /run/measured 2>&1 &`)
		h.do("daemon", "stop")
		time.Sleep(45 * time.Second)
		measured := h.sh(name, "cat /run/measured")
		t.Logf("in every five seconds of forty in which nobody asked it anything, the agent\n%s", measured)
		// It gives memory back soon after it was last asked; after that it does nothing.
		var ran []int64
		for line := range strings.Lines(measured) {
			var n int64
			if _, err := fmt.Sscanf(line, "ran %d ns", &n); err == nil {
				ran = append(ran, n)
			}
		}
		if len(ran) != 8 || ran[4]+ran[5]+ran[6]+ran[7] > 1_000_000 {
			t.Errorf("the agent ran although nobody asked: %d ns", ran)
		}
		// What is its own: the rest is the program, which lies in the guest's memory in any case.
		own := 0
		for line := range strings.Lines(measured) {
			if kib, ok := strings.CutPrefix(strings.TrimSpace(line), "RssAnon: "); ok {
				own, _ = strconv.Atoi(kib)
			}
		}
		if own == 0 || own > 8<<10 {
			t.Errorf("the agent has %d KiB of its own in memory, want at most 8 MiB", own)
		}
	})

	t.Run("restart", func(t *testing.T) {
		h := h.with(t)
		h.do("vm", "set", name, "--memory", "768M", "--restart")
		if got := h.sh(name, "cat /root/kept /kept; nproc"); got != "kept\nkept\n2" {
			t.Errorf("%q", got)
		}
		if after := h.show(name); after.PID == m.PID {
			t.Error("it was not restarted")
		}
		// Its init has just begun: a guest that boots is stopped in order, too.
		began := time.Now()
		h.do("vm", "stop", name)
		t.Logf("stop: %s", time.Since(began))
		h.disksAreClean(h.show(name))
	})
}

// pause stops the one QEMU below a directory of run directories, by its monitor.
func pause(t *testing.T, dir string) {
	t.Helper()
	sockets, err := filepath.Glob(filepath.Join(dir, "*", "qmp.sock"))
	if err != nil || len(sockets) != 1 {
		t.Fatalf("monitors: %q, %v", sockets, err)
	}
	run, err := os.Open(filepath.Dir(sockets[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/qmp.sock", run.Fd())) // its name may be too long for an address
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(callTime)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, `{"execute":"qmp_capabilities"}{"execute":"stop","id":1}`); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(conn); ; {
		if !lines.Scan() {
			t.Fatalf("QEMU did not stop: %v", lines.Err())
		}
		if strings.Contains(lines.Text(), `"id": 1`) {
			return
		}
	}
}
