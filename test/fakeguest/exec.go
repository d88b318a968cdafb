package fakeguest

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
)

// program is a command of a fake guest. It ends with an exit code; signals come on their channel.
type program func(c *call) int

type call struct {
	exec.Request
	stdin          io.Reader
	stdout, stderr io.Writer
	signals        chan int
}

// programs are all that a fake guest can run; docs of each are its code.
var programs = map[string]program{
	"true": func(*call) int { return 0 },
	"exit": func(c *call) int {
		n, _ := strconv.Atoi(strings.Join(c.Args[1:], ""))
		return n
	},
	"echo": func(c *call) int {
		fmt.Fprintln(c.stdout, strings.Join(c.Args[1:], " "))
		return 0
	},
	"complain": func(c *call) int {
		fmt.Fprintln(c.stderr, strings.Join(c.Args[1:], " "))
		return 0
	},
	"cat": func(c *call) int {
		_, _ = io.Copy(c.stdout, c.stdin)
		return 0
	},
	// what it was started with
	"context": func(c *call) int {
		fmt.Fprintf(c.stdout, "user %q dir %q env %q tty %v\n", c.User, c.Dir, c.Env, c.TTY)
		return 0
	},
	// ends by a signal of its own
	"die": func(c *call) int {
		n, _ := strconv.Atoi(c.Args[1])
		return -n
	},
	// says that it waits, then for a signal, and what it was
	"trap": func(c *call) int {
		fmt.Fprintln(c.stdout, "waiting")
		n := <-c.signals
		fmt.Fprintln(c.stdout, "got", syscall.Signal(n))
		return 128 + n
	},
	// says that it waits, and is ended by being hung up or by a signal. Its end is seen in a file here.
	"linger": func(c *call) int {
		fmt.Fprintln(c.stdout, "waiting")
		n := <-c.signals
		if len(c.Args) > 1 {
			_ = os.WriteFile(c.Args[1], []byte(syscall.Signal(n).String()+"\n"), 0o600)
		}
		return -n
	},
	// a script: of its lines only those count that are "fake: say WORDS", "fake: exit N" and "fake: wait", for a
	// signal. What it is given is read to its end.
	"sh": func(c *call) int {
		n, _ := io.Copy(io.Discard, c.stdin)
		if n > 0 {
			fmt.Fprintln(c.stdout, "was given something")
		}
		for line := range strings.Lines(c.Args[len(c.Args)-1]) {
			word, rest, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "fake: "), " ")
			switch {
			case !strings.HasPrefix(line, "fake: "):
			case word == "say":
				fmt.Fprintln(c.stdout, rest)
			case word == "exit":
				n, _ := strconv.Atoi(rest)
				return n
			case word == "wait":
				return -<-c.signals
			}
		}
		return 0
	},
	// a line in, a line out: a conversation
	"upper": func(c *call) int {
		for lines := bufio.NewScanner(c.stdin); lines.Scan(); {
			fmt.Fprintln(c.stdout, strings.ToUpper(lines.Text()))
		}
		return 0
	},
}

// run is an agentd.Guest's Exec.
func run(r exec.Request) (*agentd.Process, error) {
	does := programs[filepath.Base(r.Args[0])]
	if does == nil {
		return nil, fmt.Errorf("%s: not found in the guest: %w", r.Args[0], fs.ErrNotExist)
	}
	if r.User == "nobody-here" {
		return nil, fmt.Errorf("there is no user %q", r.User)
	}
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	errR, errW := io.Pipe()
	c := &call{Request: r, stdin: inR, stdout: outW, stderr: errW, signals: make(chan int, 16)}
	ended := make(chan struct{})
	var status exec.Status
	go func() {
		defer close(ended)
		n := does(c)
		if n < 0 {
			status.Signal = -n
		} else {
			status.Code = n
		}
		_, _, _ = inR.CloseWithError(io.ErrClosedPipe), outW.Close(), errW.Close()
	}()
	signal := func(n int) error {
		select {
		case c.signals <- n:
		default: // as pending signals of one number are one
		}
		return nil
	}
	closeAll := sync.OnceFunc(func() { _, _ = outR.Close(), errR.Close() })
	p := &agentd.Process{
		Stdin: inW, Stdout: outR, Signal: signal,
		Resize: func(exec.Size) error { return nil },
		Wait:   func() exec.Status { <-ended; return status },
		HangUp: func() { _ = signal(int(syscall.SIGHUP)); _ = inW.Close(); closeAll() },
		Close:  closeAll,
	}
	if !r.TTY {
		p.Stderr = errR
	}
	return p, nil
}
