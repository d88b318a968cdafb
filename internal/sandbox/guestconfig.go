package sandbox

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// newSecrets makes what identifies a VM and opens it. ed25519 alone: an RSA host key costs a guest
// a second of its first boot.
func newSecrets() (vm.Secrets, error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return vm.Secrets{}, err
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		return vm.Secrets{}, err
	}
	sshPub, err := ssh.NewPublicKey(pub)
	if err != nil {
		return vm.Secrets{}, err
	}
	var secret [32]byte
	var machineID [16]byte
	_, _ = rand.Read(secret[:])
	_, _ = rand.Read(machineID[:])
	// The version and variant bits of a random UUID, as machine-id(5) asks for.
	machineID[6] = machineID[6]&0x0f | 0x40
	machineID[8] = machineID[8]&0x3f | 0x80
	return vm.Secrets{
		Agent:      hex.EncodeToString(secret[:]),
		HostKey:    string(pem.EncodeToMemory(block)),
		HostKeyPub: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(sshPub))),
		MachineID:  hex.EncodeToString(machineID[:]),
	}, nil
}

// guestConfig owns the config drive: a file that is made afresh for every start, because it carries
// the time and whatever changed meanwhile, and goes away at stop, because it carries secrets.
type guestConfig struct {
	service *Service
	parts   []capability
}

func (g *guestConfig) Name() string { return stepConfig }

func (g *guestConfig) path(id vm.ID) string { return filepath.Join(g.service.vmDir(id), "config.tar") }

// Prepare renders the config drive.
func (g *guestConfig) Prepare(_ context.Context, v *vm.VM) error {
	c := boot.Config{
		Version: boot.ConfigVersion, VMID: string(v.ID), Hostname: v.Name, MachineID: v.Secrets.MachineID,
		Secret: v.Secrets.Agent, CID: v.Lease.CID, TimeUnixMS: time.Now().UnixMilli(), Direct: v.Build != nil,
	}
	for _, p := range g.parts {
		if gc, ok := p.(guestContributor); ok {
			if err := gc.GuestConfig(v, &c); err != nil {
				return err
			}
		}
	}
	return boot.WriteDrive(g.path(v.ID), c)
}

// Cleanup removes the config drive.
func (g *guestConfig) Cleanup(_ context.Context, v *vm.VM, _ lifecycle.How) error {
	if err := os.Remove(g.path(v.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(err, fault.Internal, v.Name, "the config drive cannot be removed")
	}
	return nil
}

// Machine attaches the config drive.
func (g *guestConfig) Machine(_ context.Context, v *vm.VM, spec *vmm.Spec) error {
	spec.Drives = append(spec.Drives, vmm.Drive{Role: vmm.RoleConfig, Path: g.path(v.ID), ReadOnly: true})
	return nil
}

// GuestConfig is SSH: the host's key for this VM, who may enter, and a server that answers fast.
func (g *guestConfig) GuestConfig(v *vm.VM, c *boot.Config) error {
	if v.Build != nil { // whatever is written into its root stays in the image
		return nil
	}
	key, err := g.service.images.identity()
	if err != nil {
		return err
	}
	pub, err := os.ReadFile(key + ".pub")
	if err != nil {
		return fault.Wrap(err, fault.NotFound, key+".pub", "the public half of the bundle's SSH key is missing").
			WithHint("make runtime")
	}
	c.Files = append(c.Files,
		boot.File{Path: "/etc/ssh/ssh_host_ed25519_key", Mode: 0o600, Content: []byte(v.Secrets.HostKey)},
		boot.File{Path: "/etc/ssh/ssh_host_ed25519_key.pub", Mode: 0o644, Content: []byte(v.Secrets.HostKeyPub + "\n")},
		// Not /root/.ssh/authorized_keys: that file is the user's own.
		boot.File{Path: "/etc/ssh/banger_authorized_keys", Mode: 0o644, Content: pub},
		boot.File{Path: "/etc/ssh/sshd_config.d/10-banger.conf", Mode: 0o644, Content: []byte(sshdConfig)})
	return nil
}

// sshdConfig: see sshd_config(5). The first value of a keyword wins, so this file is read early.
const sshdConfig = `# Written by banger at every start.
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile .ssh/authorized_keys /etc/ssh/banger_authorized_keys
PermitRootLogin prohibit-password
UseDNS no
PrintMotd no
PrintLastLog no
AcceptEnv LANG LC_* COLORTERM
`

// Check looks for the SSH key.
func (g *guestConfig) Check(context.Context) []doctor.Finding {
	key, err := g.service.images.identity()
	fix := seeDir(g.service.paths.State)
	for _, half := range []string{key, key + ".pub"} {
		if err == nil {
			_, err = os.Stat(half)
			fix = bundle.Repair(filepath.Dir(key)) // a key of the state directory was made by identity
		}
	}
	if err != nil {
		return []doctor.Finding{doctor.FromError("ssh-key", "SSH key of the installation", err, fix)}
	}
	return []doctor.Finding{{Code: "ssh-key", Severity: doctor.Pass, Title: "SSH key of the installation", Detail: key}}
}
