package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/mattn/go-isatty"
)

// How often a running stage shows that it is alive: in place on a terminal, as a line elsewhere.
const (
	tickTerminal = 500 * time.Millisecond
	tickLog      = 10 * time.Second
)

// progress shows the stage that runs and since when. Its methods may be called from several goroutines.
type progress struct {
	w     io.Writer
	tty   bool
	now   func() time.Time
	start time.Time

	mu     sync.Mutex
	stage  string
	detail string
	since  time.Time
	stop   chan struct{}
	done   sync.WaitGroup
}

func newProgress(f *os.File) *progress {
	return &progress{w: f, tty: isatty.IsTerminal(f.Fd()) && os.Getenv("TERM") != "dumb", now: time.Now, start: time.Now()}
}

// begin ends the stage before and starts one; it is on the screen when begin returns.
func (p *progress) begin(format string, args ...any) {
	p.end()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stage, p.detail, p.since = fmt.Sprintf(format, args...), "", p.now()
	p.show()
	tick := tickLog
	if p.tty {
		tick = tickTerminal
	}
	stop := make(chan struct{})
	p.stop = stop
	p.done.Go(func() {
		t := time.NewTicker(tick)
		defer t.Stop()
		for {
			select {
			case <-stop:
				return
			case <-t.C:
				p.mu.Lock()
				p.show()
				p.mu.Unlock()
			}
		}
	})
}

// note says what the stage is doing now; it shows with the next tick.
func (p *progress) note(detail string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.detail = detail
	if p.tty {
		p.show()
	}
}

// end closes the running stage, if there is one, with the time it took.
func (p *progress) end() {
	p.mu.Lock()
	stage, since, stop := p.stage, p.since, p.stop
	p.stage, p.stop = "", nil
	p.mu.Unlock()
	if stop == nil {
		return
	}
	close(stop)
	p.done.Wait()
	if took := p.now().Sub(since); p.tty {
		fmt.Fprintf(p.w, "\r\x1b[K  %s  %s\n", stage, seconds(took))
	} else if took >= time.Second {
		fmt.Fprintf(p.w, "  %s: done in %s\n", stage, seconds(took))
	}
}

// say ends the running stage and writes a line that stays.
func (p *progress) say(format string, args ...any) {
	p.end()
	fmt.Fprintf(p.w, "  "+format+"\n", args...)
}

// show writes the running stage's line. The caller holds mu.
func (p *progress) show() {
	if p.stage == "" {
		return
	}
	line := p.stage
	if p.detail != "" {
		line += " (" + p.detail + ")"
	}
	took := p.now().Sub(p.since)
	if p.tty {
		fmt.Fprintf(p.w, "\r\x1b[K  … %s  %s", line, seconds(took))
		return
	}
	if took < time.Second {
		fmt.Fprintf(p.w, "  %s\n", line)
	} else {
		fmt.Fprintf(p.w, "  %s, %s so far\n", line, seconds(took))
	}
}

func seconds(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return fmt.Sprintf("%ds", int(d.Seconds()))
}
