// Package sshd owns the SSH server of guests whose image has none: entry by public key for the users of the
// guest, shells and commands, with and without a terminal, files by SFTP (which scp speaks), and connections to
// the guest's ports (ssh -L).
//
// It takes no passwords, forwards no agent and no X11, and listens on nobody's behalf (ssh -R). Keys with options
// in an authorized_keys file are not taken, since what the options would forbid is not known here.
package sshd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
)

// Where the host has put what the server needs (the sandbox's guest config), and where it listens.
const (
	hostKeyPath = "/etc/ssh/ssh_host_ed25519_key"
	address     = ":22"
)

// Bounds of what strangers may make the server do.
const (
	handshakeTime = time.Minute // from a connection to a user who is let in
	maxStrangers  = 32          // connections in that time
	maxTries      = 6           // keys of one connection, as OpenSSH's MaxAuthTries
	maxSessions   = 64          // channels of one connection
)

// FilesFlag makes the program serve SFTP on its standard files.
const FilesFlag = "--sftp"

// Run serves until SIGTERM.
func Run() error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	pem, err := os.ReadFile(hostKeyPath)
	if err != nil {
		return err
	}
	key, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		return fmt.Errorf("%s: %w", hostKeyPath, err)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	s := &Server{HostKey: key, Allowed: allowed, Start: agentd.StartProcess, Shell: shellOf, Files: []string{boot.SSHServerPath, FilesFlag}}
	return s.Serve(ctx, listener)
}

// Server is an SSH server. Its fields are set before Serve.
type Server struct {
	HostKey ssh.Signer
	// Allowed says whether a user may enter by a key.
	Allowed func(user string, key ssh.PublicKey) bool
	Start   func(exec.Request) (*agentd.Process, error)
	// Shell is a user's shell.
	Shell func(user string) string
	// Files is the command that serves SFTP.
	Files []string
}

// Serve accepts connections until ctx ends or the listener fails, and closes it.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	defer listener.Close()
	strangers := make(chan struct{}, maxStrangers)
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case strangers <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		conns.Go(func() { s.serve(ctx, conn, func() { <-strangers }) })
	}
}

// serve is one connection. known is called once, when its user is let in or never will be.
func (s *Server) serve(ctx context.Context, conn net.Conn, known func()) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	config := &ssh.ServerConfig{MaxAuthTries: maxTries, ServerVersion: "SSH-2.0-banger",
		PublicKeyCallback: func(c ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if !s.Allowed(c.User(), key) {
				return nil, fmt.Errorf("the key %s does not open %q", ssh.FingerprintSHA256(key), c.User())
			}
			return nil, nil
		}}
	config.AddHostKey(s.HostKey)
	_ = conn.SetDeadline(time.Now().Add(handshakeTime)) // a connection that is gone fails next
	client, channels, requests, err := ssh.NewServerConn(conn, config)
	known()
	if err != nil {
		return
	}
	defer client.Close()
	if conn.SetDeadline(time.Time{}) != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	slots := make(chan struct{}, maxSessions)
	var sessions sync.WaitGroup
	defer sessions.Wait()
	for c := range channels {
		select {
		case slots <- struct{}{}:
		default:
			_ = c.Reject(ssh.ResourceShortage, "too many sessions")
			continue
		}
		sessions.Go(func() {
			defer func() { <-slots }()
			switch c.ChannelType() {
			case "session":
				s.session(c, client.User())
			case "direct-tcpip":
				forward(ctx, c)
			default:
				_ = c.Reject(ssh.UnknownChannelType, "unknown channel type")
			}
		})
	}
}

// session is one of RFC 4254, 6: variables, perhaps a terminal, then a shell, a command or a subsystem.
func (s *Server) session(c ssh.NewChannel, user string) {
	channel, requests, err := c.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	r := exec.Request{User: userOf(user)}
	var p *agentd.Process
	ended := make(chan struct{})
	var running sync.WaitGroup
	defer running.Wait()
	defer func() {
		select {
		case <-ended: // what it left in the background stays, as with OpenSSH
		default:
			if p != nil {
				p.HangUp() // the client is gone
			}
		}
	}()
	for q := range requests {
		args, known := s.prepare(q, &r, user, p)
		if args == nil {
			if q.WantReply {
				_ = q.Reply(known, nil)
			}
			continue
		}
		r.Args = args
		started, err := s.Start(r)
		if q.WantReply {
			_ = q.Reply(true, nil)
		}
		if err != nil {
			fmt.Fprintf(channel.Stderr(), "%v\r\n", err)
			code := exec.CodeCannotRun
			if errors.Is(err, os.ErrNotExist) {
				code = exec.CodeNotFound
			}
			sendStatus(channel, exec.Status{Code: code})
			return
		}
		p = started
		running.Go(func() { carry(channel, p, ended) })
	}
}

// prepare takes a request in. It returns the command if this is the one that starts it.
func (s *Server) prepare(q *ssh.Request, r *exec.Request, user string, p *agentd.Process) (args []string, known bool) {
	switch q.Type {
	case "env":
		var v struct{ Name, Value string }
		if ssh.Unmarshal(q.Payload, &v) != nil || !accepted(v.Name) || strings.ContainsRune(v.Value, 0) || p != nil {
			return nil, false
		}
		r.Env = append(r.Env, v.Name+"="+v.Value)
		return nil, true
	case "pty-req":
		var v struct {
			Term                      string
			Cols, Rows, Width, Height uint32
			Modes                     string
		}
		if ssh.Unmarshal(q.Payload, &v) != nil || p != nil || strings.ContainsRune(v.Term, 0) {
			return nil, false
		}
		r.TTY, r.Rows, r.Cols = true, uint16(v.Rows), uint16(v.Cols)
		r.Env = append(r.Env, "TERM="+v.Term)
		return nil, true
	case "window-change":
		var v struct{ Cols, Rows, Width, Height uint32 }
		if ssh.Unmarshal(q.Payload, &v) != nil || p == nil || p.Resize == nil {
			return nil, false
		}
		return nil, p.Resize(exec.Size{Rows: uint16(v.Rows), Cols: uint16(v.Cols)}) == nil
	case "signal":
		var v struct{ Name string }
		if ssh.Unmarshal(q.Payload, &v) != nil || p == nil {
			return nil, false
		}
		return nil, p.Signal(int(unix.SignalNum("SIG"+v.Name))) == nil
	}
	if p != nil { // one command a session
		return nil, false
	}
	switch q.Type {
	case "shell":
		return []string{s.Shell(user), "-l"}, true
	case "exec":
		var v struct{ Command string }
		if ssh.Unmarshal(q.Payload, &v) != nil || strings.ContainsRune(v.Command, 0) {
			return nil, false
		}
		return []string{s.Shell(user), "-c", v.Command}, true
	case "subsystem":
		var v struct{ Name string }
		if ssh.Unmarshal(q.Payload, &v) != nil || v.Name != "sftp" {
			return nil, false
		}
		return s.Files, true
	}
	return nil, false
}

// accepted are the variables that a client may set, as banger's sshd_config has them.
func accepted(name string) bool {
	return name == "LANG" || strings.HasPrefix(name, "LC_") && !strings.ContainsAny(name, "=\x00") || name == "COLORTERM"
}

// carry moves data between a channel and a process until that has ended, which closes ended, and all that it
// wrote is sent.
func carry(channel ssh.Channel, p *agentd.Process, ended chan<- struct{}) {
	defer p.Close()
	input := make(chan struct{})
	go func() {
		defer close(input)
		_, _ = io.Copy(p.Stdin, channel)
		_ = p.Stdin.Close()
	}()
	var output sync.WaitGroup
	output.Go(func() { _, _ = io.Copy(channel, p.Stdout) })
	if p.Stderr != nil {
		output.Go(func() { _, _ = io.Copy(channel.Stderr(), p.Stderr) })
	}
	status := p.Wait()
	close(ended)
	output.Wait()
	sendStatus(channel, status)
	_ = channel.Close()
	<-input
}

func sendStatus(channel ssh.Channel, s exec.Status) {
	if s.Signal != 0 {
		name := strings.TrimPrefix(unix.SignalName(unix.Signal(s.Signal)), "SIG")
		_, _ = channel.SendRequest("exit-signal", false, ssh.Marshal(struct {
			Name    string
			Dumped  bool
			Message string
			Lang    string
		}{Name: name}))
		return
	}
	code := s.Code
	if s.Failed != "" && code == 0 {
		code = exec.CodeCannotRun
	}
	_, _ = channel.SendRequest("exit-status", false, binary.BigEndian.AppendUint32(nil, uint32(code)))
}

// forward connects the client to a port that the guest reaches (ssh -L).
func forward(ctx context.Context, c ssh.NewChannel) {
	var v struct {
		Host     string
		Port     uint32
		From     string
		FromPort uint32
	}
	if ssh.Unmarshal(c.ExtraData(), &v) != nil || v.Port > 65535 {
		_ = c.Reject(ssh.ConnectionFailed, "that is no address")
		return
	}
	const dialTime = 30 * time.Second
	conn, err := (&net.Dialer{Timeout: dialTime}).DialContext(ctx, "tcp", net.JoinHostPort(v.Host, strconv.Itoa(int(v.Port))))
	if err != nil {
		_ = c.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	defer conn.Close()
	channel, requests, err := c.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	go ssh.DiscardRequests(requests)
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(channel, conn)
		_ = channel.CloseWrite()
	})
	both.Go(func() {
		_, _ = io.Copy(conn, channel)
		if t, ok := conn.(*net.TCPConn); ok {
			_ = t.CloseWrite()
		}
	})
	both.Wait()
}
