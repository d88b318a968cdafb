package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
)

// dial serves web pages on ports 8080 and, by TLS, 8443 of a fake guest, port 22 with the host key and the
// authorized key that the guest was given on its config drive, and port 7, which echoes.
func dial(_ context.Context, g *fakevmm.Guest, port int) (net.Conn, error) {
	var serve func(net.Conn)
	switch port {
	case 7:
		serve = func(c net.Conn) {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}
	case 22:
		server, err := sshConfig(g.Spec())
		if err != nil {
			return nil, err
		}
		if _, ok := g.Fault("impostor"); ok {
			if err := disguise(server); err != nil {
				return nil, err
			}
		}
		serve = func(c net.Conn) { serveSSH(c, server) }
	case 8080, 8443:
		serve = func(c net.Conn) { serveWeb(c, port == 8443) }
	default:
		return nil, syscall.ECONNREFUSED
	}
	// A real socket pair: the client's half-closes must arrive.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "guest port")
		ends[i], err = net.FileConn(f)
		_ = f.Close()
		if err != nil {
			return nil, err
		}
	}
	go serve(ends[1])
	return ends[0], nil
}

func sshConfig(spec vmm.Spec) (*ssh.ServerConfig, error) {
	var drive string
	for _, d := range spec.Drives {
		if d.Role == vmm.RoleConfig {
			drive = d.Path
		}
	}
	f, err := os.Open(drive)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	config, err := boot.ReadDrive(f)
	if err != nil {
		return nil, err
	}
	var allowed ssh.PublicKey
	server := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if allowed == nil || string(key.Marshal()) != string(allowed.Marshal()) {
			return nil, errors.New("not the key on the config drive")
		}
		return &ssh.Permissions{}, nil
	}}
	hostKeys := 0
	for _, file := range config.Files {
		switch {
		case strings.HasSuffix(file.Path, "/ssh_host_ed25519_key"):
			key, err := ssh.ParsePrivateKey(file.Content)
			if err != nil {
				return nil, err
			}
			server.AddHostKey(key)
			hostKeys++
		case strings.Contains(file.Path, "authorized_keys"):
			if allowed, _, _, _, err = ssh.ParseAuthorizedKey(file.Content); err != nil {
				return nil, fmt.Errorf("%s: %w", file.Path, err)
			}
		}
	}
	if hostKeys == 0 || allowed == nil {
		return nil, fmt.Errorf("the config drive carries %d host keys and authorized key %v", hostKeys, allowed)
	}
	return server, nil
}

// disguise gives the server a host key that is nobody's, in place of the VM's.
func disguise(server *ssh.ServerConfig) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		return err
	}
	server.AddHostKey(signer) // there is one of each kind
	return nil
}

func serveSSH(conn net.Conn, config *ssh.ServerConfig) {
	defer conn.Close()
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return // the client says why
	}
	go ssh.DiscardRequests(requests)
	for offered := range channels {
		if offered.ChannelType() != "session" {
			_ = offered.Reject(ssh.UnknownChannelType, "sessions only")
			continue
		}
		channel, requests, err := offered.Accept()
		if err != nil {
			return
		}
		go serveSession(conn, channel, requests)
	}
}

func serveSession(conn net.Conn, channel ssh.Channel, requests <-chan *ssh.Request) {
	defer channel.Close()
	terminal := false
	for r := range requests {
		var command string
		switch r.Type {
		case "exec":
			var payload struct{ Command string }
			if ssh.Unmarshal(r.Payload, &payload) == nil {
				command = payload.Command
			}
		case "shell":
			command = "shell"
			if terminal {
				command = "login"
			}
		default:
			terminal = terminal || r.Type == "pty-req"
			_ = r.Reply(r.Type == "env" || r.Type == "pty-req", nil)
			continue
		}
		_ = r.Reply(true, nil)
		if command == "drop" {
			_ = conn.Close()
			return
		}
		status := run(channel, command)
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{uint32(status)}))
		return
	}
}

// run is all that a fake guest can do.
func run(c ssh.Channel, command string) int {
	word, rest, _ := strings.Cut(command, " ")
	switch word {
	case "true":
		return 0
	case "exit":
		n, _ := strconv.Atoi(rest)
		return n
	case "echo":
		fmt.Fprintln(c, rest)
		return 0
	case "complain":
		fmt.Fprintln(c.Stderr(), rest)
		return 0
	case "cat":
		_, _ = io.Copy(c, c)
		return 0
	case "shell": // until there is no more input
		fmt.Fprintln(c, "welcome")
		_, _ = io.Copy(io.Discard, c)
		return 0
	case "login": // nobody types
		fmt.Fprintln(c, "welcome")
		return 0
	}
	fmt.Fprintf(c.Stderr(), "%s: not found\n", word)
	return 127
}
