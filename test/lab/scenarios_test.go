//go:build e2e

package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// driver is what VMs must run under in the lab.
const driver = "firecracker"

// Bounds on a busy core that emulates a host, whose guests run at a tenth of that.
const (
	callTime  = 5 * time.Minute
	buildTime = 15 * time.Minute
)

// person is somebody who types commands in a checkout in the lab.
type person struct {
	t    *testing.T
	m    *Machine
	name string
}

// try runs a shell command in the checkout and returns what it printed on its standard output.
func (p person) try(bound time.Duration, command string) (stdout string, err error) {
	p.t.Helper()
	ctx, cancel := context.WithTimeoutCause(p.t.Context(), bound, fmt.Errorf("not within %v", bound))
	defer cancel()
	var out, errs lockedBuffer
	began := time.Now()
	err = p.m.Run(ctx, p.name, "mkdir -p /tmp/lab-cover; cd ~/banger && export GOCOVERDIR=/tmp/lab-cover\n"+command, nil, &out, &errs)
	if err != nil {
		err = fmt.Errorf("%s$ %s\n%w\n%s%s", p.name, command, err, out.String(), errs.String())
	}
	if took := time.Since(began); took > 2*time.Second {
		first, _, _ := strings.Cut(command, "\n")
		p.t.Logf("%5.1fs  %s$ %s", took.Seconds(), p.name, first)
	}
	return out.String(), err
}

// do is try for what must succeed.
func (p person) do(command string) string {
	p.t.Helper()
	out, err := p.try(callTime, command)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// in runs a shell command in a VM, which must succeed.
func (p person) in(vm, command string) string {
	p.t.Helper()
	return strings.TrimSuffix(p.do("./banger vm ssh "+vm+" -- "+quote(command)), "\n")
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// vm is what --output json says of one.
type vm struct {
	Name, State, Note, VMM, Accel, Directory string
	PID                                      int
}

func (p person) json(into any, command string) {
	p.t.Helper()
	out := p.do(command + " --output json")
	if err := json.Unmarshal([]byte(out), into); err != nil {
		p.t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

func (p person) show(name string) (v vm) {
	p.t.Helper()
	p.json(&v, "./banger vm show "+name)
	return v
}

// states are the VMs with their states, by name.
func (p person) states() string {
	p.t.Helper()
	var all []vm
	p.json(&all, "./banger vm list")
	var out []string
	for _, v := range all {
		out = append(out, v.Name+" "+v.State)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func (p person) wantStates(want string) {
	p.t.Helper()
	if got := p.states(); got != want {
		p.t.Errorf("%s has the VMs %q, want %q", p.name, got, want)
	}
}

// until waits for what the daemon does by itself. The command line has no event to wait for.
func (p person) until(want string) {
	p.t.Helper()
	began := time.Now()
	for p.states() != want {
		if time.Since(began) > callTime {
			p.wantStates(want)
			return
		}
		time.Sleep(time.Second)
	}
	p.t.Logf("%5.1fs  until %s", time.Since(began).Seconds(), want)
}

// wantDriver sees that a VM runs under Firecracker with KVM.
func (p person) wantDriver(name string) {
	p.t.Helper()
	if v := p.show(name); v.VMM != driver || v.Accel != "kvm" || v.PID == 0 {
		p.t.Errorf("%s runs under %q with %q as process %d, want %s with kvm", name, v.VMM, v.Accel, v.PID, driver)
	}
}

// leave deletes everything, stops the daemon, and looks for what is left.
func (p person) leave() {
	p.t.Helper()
	var all []vm
	p.json(&all, "./banger vm list")
	for _, v := range all {
		p.do("./banger vm delete " + v.Name)
	}
	p.do("./banger daemon stop")
	nothingLeft(p.t, p.m, p.name)
}

// disksAreClean looks at the disks of a stopped VM with e2fsck, which changes nothing.
func (p person) disksAreClean(name string) {
	p.t.Helper()
	dir := p.show(name).Directory
	for _, disk := range []string{"system.ext4", "work.ext4"} {
		p.do("/usr/sbin/e2fsck -fn " + filepath.Join(dir, disk) + " 2>&1")
	}
}

// TestSandbox types README's command as a new user would, as root and as an ordinary user. Prepared are
// what a first run fetches and what only takes time: Debian's packages, as the caches of `make runtime`
// have them, Go with its modules, and Go's build cache.
func TestSandbox(t *testing.T) {
	slow(t)
	alongside(t)
	fresh := packed(t, Content{Fresh: true})
	m := boot(t, Options{Payload: fresh})
	for _, user := range []string{"user", "root"} {
		t.Run(user, func(t *testing.T) {
			p := person{t, m, user}
			for _, again := range []bool{false, true} {
				out, err := p.try(buildTime, "make sandbox 2>&1")
				if err != nil {
					t.Fatal(err)
				}
				t.Log(out)
				if !strings.Contains(out, "Debian GNU/Linux 13") || again != strings.Contains(out, "already running") {
					t.Errorf("make sandbox, again %v, said:\n%s", again, out)
				}
			}
			p.wantDriver("sandbox")
			p.wantStates("sandbox running")
			p.leave()
		})
	}
}

// TestHostReboot reboots the host under running VMs of two users. After it all are stopped, start again
// with their files, and nothing of the time before is left.
func TestHostReboot(t *testing.T) {
	slow(t)
	alongside(t)
	m := boot(t, Options{})
	user, root := person{t, m, "user"}, person{t, m, "root"}
	user.do("./banger vm create --name first --memory 512M; ./banger vm create --name second --memory 512M; ./banger vm create --name off --no-start")
	root.do("./banger vm create --name roots --memory 512M")
	for _, v := range []struct {
		p    person
		name string
	}{{user, "first"}, {user, "second"}, {root, "roots"}} {
		v.p.wantDriver(v.name)
		v.p.in(v.name, "echo kept > /root/file && echo kept > /etc/file && sync")
	}
	began := time.Now()
	if err := m.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("%5.1fs  the host reboots", time.Since(began).Seconds())
	if out, err := m.Output(t.Context(), "root", "ps -eo args= | grep -E '^[^ ]*(firecracker|qemu|bangerd)' || true"); err != nil || out != "" {
		t.Errorf("after the reboot there run, before anybody asked: %q, %v", out, err)
	}
	// The daemon that comes with the first command clears up what the reboot interrupted.
	user.until("first stopped, off stopped, second stopped")
	root.until("roots stopped")
	for _, p := range []person{user, root} {
		if left := p.do("find ~/.local/state/banger/run -mindepth 1 ! -type d"); left != "" {
			t.Errorf("files of the run before are left:\n%s", left)
		}
	}
	user.do("./banger vm start first second")
	root.do("./banger vm start roots")
	user.wantStates("first running, off stopped, second running")
	for _, v := range []struct {
		p    person
		name string
	}{{user, "first"}, {user, "second"}, {root, "roots"}} {
		v.p.wantDriver(v.name)
		if got := v.p.in(v.name, "cat /root/file /etc/file"); got != "kept\nkept" {
			t.Errorf("%s has %q in its files", v.name, got)
		}
	}
	user.do("./banger vm stop first second")
	user.disksAreClean("first")
	root.leave() // first: its bridge is seen by all
	user.leave()
}

// writer runs in a guest: it writes numbered files on each kind of disk there is, says each number when its
// files are synced, and dirties much more without syncing it.
const writer = `cd /
dirs="/root/w /srv/w /var/lib/docker/w"
mkdir -p $dirs; sync
(while :; do for d in $dirs; do date >> $d/noise; cp -f /usr/bin/bash $d/copy; done; done) &
i=0
while :; do
    i=$((i + 1))
    for d in $dirs; do yes $i | head -c 100000 > $d/$i; sync $d/$i; done
    echo $i
done`

// TestPowerCut cuts the host's power in the middle of a guest's writes. What the guest had synced is
// there, and the filesystems of host and guest recover by themselves.
func TestPowerCut(t *testing.T) {
	slow(t)
	alongside(t)
	disk := filepath.Join(place.scratch, "power-cut.ext4")
	if err := CopyDisk(t.Context(), place.host, disk); err != nil {
		t.Fatal(err)
	}
	m := boot(t, Options{Disk: disk})
	p := person{t, m, "user"}
	p.do("./banger vm create --name writer --memory 512M && sync") // the VM itself is on the host's disk
	p.wantDriver("writer")

	// What is said before the cut counts.
	said, in := io.Pipe()
	ctx, cancel := context.WithTimeoutCause(t.Context(), callTime, errors.New("the guest does not write"))
	defer cancel()
	go func() {
		err := m.Run(ctx, p.name, "cd ~/banger && exec ./banger vm ssh writer -- "+quote(writer), nil, in, io.Discard)
		_ = in.CloseWithError(errors.Join(err, io.EOF))
	}()
	synced := 0
	lines := bufio.NewScanner(said)
	for synced < 15 && lines.Scan() {
		n, err := strconv.Atoi(lines.Text())
		if err != nil || n != synced+1 {
			t.Fatalf("the guest says %q after %d", lines.Text(), synced)
		}
		synced = n
	}
	if synced < 15 {
		t.Fatalf("the guest wrote only %d files: %v", synced, lines.Err())
	}
	m.Kill()
	_ = said.Close()
	t.Logf("the power goes when %d rounds are synced", synced)

	m = boot(t, Options{Disk: disk})
	p = person{t, m, "user"}
	if out, err := m.Output(t.Context(), "root", "dmesg; findmnt -no OPTIONS /"); err != nil || strings.Contains(out, "EXT4-fs error") || !strings.Contains(out, "rw,") {
		t.Errorf("the host's filesystem did not recover: %v\n%s", err, out)
	}
	p.until("writer stopped")
	p.do("./banger vm start writer")
	p.wantDriver("writer")
	lost := p.in("writer", fmt.Sprintf(`for i in $(seq 1 %d); do for d in /root/w /srv/w /var/lib/docker/w; do
    yes $i | head -c 100000 | cmp - $d/$i || echo lost: $d/$i
done; done 2>&1`, synced))
	if lost != "" {
		t.Errorf("what the guest had synced is not there:\n%s", lost)
	}
	if bad := p.in("writer", "dmesg | grep -E 'EXT4-fs error|I/O error|Buffer I/O' || true; echo alive > /root/after && cat /root/after"); bad != "alive" {
		t.Errorf("the guest's filesystems did not recover:\n%s", bad)
	}
	t.Logf("the guest's kernel: %s", p.in("writer", "dmesg | grep -i 'recovery complete\\|orphan' || true"))
	p.do("./banger vm stop writer")
	p.disksAreClean("writer")
	p.leave()
}

// TestEightAtOnce creates eight VMs at the same moment.
func TestEightAtOnce(t *testing.T) {
	slow(t)
	alongside(t)
	m := boot(t, Options{})
	p := person{t, m, "user"}
	began := time.Now()
	out, err := p.try(buildTime, `printf 'boot_timeout = "10m"\n' > config.toml; export BANGER_CONFIG=$PWD/config.toml
for i in 1 2 3 4 5 6 7 8; do ./banger vm create --name vm-$i --memory 512M >$i.log 2>&1 & pids="$pids $!"; done
for pid in $pids; do wait $pid || failed="$failed $?"; done
cat [1-8].log; [ -z "$failed" ]`)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%5.1fs  eight VMs are up\n%s", time.Since(began).Seconds(), out)
	// Eight systems come up on one emulated CPU: the last SSH server begins minutes after the first agent has answered.
	if out, err := p.try(buildTime, "for i in 1 2 3 4 5 6 7 8; do ./banger vm wait vm-$i --for ssh --timeout 10m || exit 1; done"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%5.1fs  all eight let in", time.Since(began).Seconds())
	var want []string
	pids := map[int]bool{}
	for i := range 8 {
		name := fmt.Sprintf("vm-%d", i+1)
		want = append(want, name+" running")
		if got := p.in(name, "hostname"); got != name {
			t.Errorf("%s says it is %q", name, got)
		}
		v := p.show(name)
		pids[v.PID] = true
		if v.VMM != driver {
			t.Errorf("%s runs under %s", name, v.VMM)
		}
	}
	p.wantStates(strings.Join(want, ", "))
	if len(pids) != 8 {
		t.Errorf("the VMs have %d processes", len(pids))
	}
	p.leave()
}

// TestHangIsNoticed holds a host still: what waits for it ends, and says that banger is not to blame.
func TestHangIsNoticed(t *testing.T) {
	slow(t)
	alongside(t)
	m, err := Boot(t.Context(), Options{Host: place.host, Memory: 1024})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Kill()
	if err := m.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*silenceTime+probeTime)
	defer cancel()
	_, err = m.Output(ctx, "user", "true")
	if err == nil || !strings.Contains(err.Error(), NoVerdict) {
		t.Errorf("a command on a host that hangs ends with %v", err)
	}
}
