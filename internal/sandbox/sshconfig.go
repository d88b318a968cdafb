package sandbox

import (
	"context"
	"os"
	"path/filepath"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/sshconfig"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// SSHUser is who VMs are entered as.
const SSHUser = "root"

// HostKeyAlias is the name of a VM's host key in a file of known hosts, unique to the VM.
func HostKeyAlias(id vm.ID) string { return string(id) + ".banger" }

// sshFile keeps banger's file in ~/.ssh what all VMs say, if the user has asked for it. It is not a
// resource of one VM: it is written whole whenever it differs, so that no crash leaves it wrong for
// longer than until the next daemon.
type sshFile struct {
	service *Service
	files   sshconfig.Files
	mu      sync.Mutex
	changed chan struct{} // holds one: there is something to look at
}

func newSSHFile(s *Service) *sshFile {
	f := &sshFile{service: s, changed: make(chan struct{}, 1)}
	if home, err := os.UserHomeDir(); err == nil { // without one nobody has asked
		f.files.Dir = filepath.Join(home, ".ssh")
	}
	return f
}

// look has the file compared soon. It never waits.
func (f *sshFile) look() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// keep compares whenever VMs have changed, until ctx ends.
func (f *sshFile) keep(ctx context.Context) {
	for {
		select {
		case <-f.changed:
			if err := f.update(); err != nil {
				f.service.log.Warn("ssh's configuration could not be brought up to date", "path", f.files.Path(), "err", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// update writes the file if it is installed.
func (f *sshFile) update() error {
	if f.files.Dir == "" {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	program, err := f.files.Installed(f.service.store.InstallationID())
	if fault.Is(err, fault.Exists) {
		return nil // somebody else's: whoever asks is told
	}
	if err != nil || program == "" {
		return err
	}
	c, err := f.content(program)
	if err != nil {
		return err
	}
	return f.files.Write(c)
}

// placeVariables are those of the environment by which a program finds this installation.
var placeVariables = []string{"BANGER_STATE_DIR", "BANGER_CONFIG", "BANGER_RUNTIME_DIR", "BANGERD", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"}

func (f *sshFile) content(program string) (sshconfig.Content, error) {
	s := f.service
	identity, err := s.images.identity()
	if err != nil {
		return sshconfig.Content{}, err
	}
	c := sshconfig.Content{
		Installation: s.store.InstallationID(), Program: program, User: SSHUser, IdentityFile: identity,
		KnownHosts: filepath.Join(s.paths.State, "known_hosts"),
	}
	for _, name := range placeVariables {
		if value := os.Getenv(name); value != "" {
			c.Env = append(c.Env, name+"="+value)
		}
	}
	for _, v := range s.store.VMs() {
		if v.Desired != vm.WantDeleted {
			c.Hosts = append(c.Hosts, sshconfig.Host{Name: v.Name, ID: string(v.ID), Alias: HostKeyAlias(v.ID), HostKey: v.Secrets.HostKeyPub})
		}
	}
	return c, nil
}

// SSHConfig is what ssh's configuration has, or would have, of banger.
type SSHConfig struct {
	Path      string // of banger's own file
	Text      string
	Installed bool
	Included  bool // by ~/.ssh/config
}

// SSHConfig tells what is, or would be with program, in ssh's configuration. It changes nothing.
// fault.Exists if banger's file is somebody else's.
func (s *Service) SSHConfig(_ context.Context, program string) (SSHConfig, error) {
	s.ssh.mu.Lock()
	defer s.ssh.mu.Unlock()
	return s.ssh.show(program)
}

func (f *sshFile) show(program string) (SSHConfig, error) {
	if f.files.Dir == "" {
		return SSHConfig{}, fault.New(fault.Precondition, "ssh-config", "the daemon does not know its user's home directory").
			WithHint("banger daemon stop, and start it with HOME set")
	}
	installed, err := f.files.Installed(f.service.store.InstallationID())
	if err != nil {
		return SSHConfig{}, err
	}
	if installed != "" {
		program = installed
	}
	c, err := f.content(program)
	if err != nil {
		return SSHConfig{}, err
	}
	out := SSHConfig{Path: f.files.Path(), Installed: installed != ""}
	if out.Text, err = c.Render(); err != nil {
		return out, err
	}
	out.Included, err = f.files.Included()
	if err != nil {
		return out, fault.Wrap(err, fault.Permission, f.files.Dir, "its config cannot be read: %v", err)
	}
	return out, nil
}

// InstallSSHConfig writes banger's file in ~/.ssh, to be kept from then on, and with include the line
// in ~/.ssh/config that makes ssh read it. program is the banger that ssh is to run. Repeating it is fine.
func (s *Service) InstallSSHConfig(_ context.Context, program string, include bool) (SSHConfig, error) {
	if !filepath.IsAbs(program) {
		return SSHConfig{}, fault.New(fault.Invalid, "ssh-config", "%q is no absolute path of a program", program)
	}
	f := s.ssh
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.show(program); err != nil { // somebody else's file is not overwritten
		return SSHConfig{}, err
	}
	c, err := f.content(program)
	if err != nil {
		return SSHConfig{}, err
	}
	if err := f.files.Write(c); err != nil {
		return SSHConfig{}, err
	}
	if include {
		if err := f.files.Include(); err != nil {
			return SSHConfig{}, err
		}
	}
	return f.show(program)
}

// RemoveSSHConfig takes banger's file and line out of ~/.ssh. Fine if they are not there.
func (s *Service) RemoveSSHConfig(context.Context) error {
	f := s.ssh
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.files.Dir == "" {
		return nil
	}
	if _, err := f.files.Installed(s.store.InstallationID()); err != nil {
		return err
	}
	return f.files.Remove()
}
