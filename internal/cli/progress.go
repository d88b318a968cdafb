package cli

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/charmbracelet/x/ansi"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

const (
	frameEvery    = 100 * time.Millisecond // redraws on a terminal
	firstLine     = 2 * time.Second        // no wait is silent for longer
	heartbeat     = 10 * time.Second       // between lines of a long stage, when nothing can be redrawn
	quietStage    = 100 * time.Millisecond // shorter stages are not worth a line
	spinnerFrames = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
)

// progress shows an operation's stages on stderr while it runs. On a terminal the running stage is
// redrawn in place; elsewhere each stage gets a line when it ends, and a long one lines in between.
// What people cannot have waited for is not mentioned.
type progress struct {
	a     *app
	title string
	quiet bool

	mu      sync.Mutex
	start   time.Time
	printed int // finished stages with a line
	running *bangerv1.OperationStage
	since   time.Time // when running began, by this clock
	drawn   bool      // an unfinished line is on the terminal
	frame   int
	said    time.Time // of the last line, for the heartbeat
	stop    chan struct{}
	done    chan struct{}

	live func(now time.Time) string // says what goes on where no operation tells; nil: running does
}

func (a *app) progress(title string, quiet bool) *progress {
	p := &progress{a: a, title: title, quiet: quiet || a.json, start: a.now(), stop: make(chan struct{}), done: make(chan struct{})}
	p.since, p.said = p.start, p.start
	go p.tick()
	return p
}

// wait names what is waited for where no operation tells.
func (p *progress) wait(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = &bangerv1.OperationStage{Name: fmt.Sprintf(format, args...)}
}

// tick redraws, and keeps long stages from being silent.
func (p *progress) tick() {
	defer close(p.done)
	every := frameEvery
	if !p.a.errTTY {
		every = firstLine / 4
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-ticker.C:
			p.mu.Lock()
			p.beat()
			p.mu.Unlock()
		}
	}
}

func (p *progress) label() string {
	if p.live != nil {
		return p.live(p.a.now())
	}
	if p.running == nil {
		return "waiting"
	}
	if d := p.running.GetDetail(); d != "" {
		return client.StageText(p.running.GetName()) + ": " + d
	}
	return client.StageText(p.running.GetName())
}

func (p *progress) beat() {
	if p.quiet {
		return
	}
	now := p.a.now()
	elapsed := now.Sub(p.since)
	if p.a.errTTY {
		frames := []rune(spinnerFrames)
		line := fmt.Sprintf("%s %s: %s %s", string(frames[p.frame%len(frames)]), p.title, p.label(), p.a.paintErr(dim, formatTook(elapsed)))
		if width := int(sizeOf(p.a.stderr).Col); width > 0 { // one that goes on in the next line cannot be taken back
			line = ansi.Truncate(line, width-1, "…")
		}
		fmt.Fprint(p.a.stderr, "\r\x1b[K"+line)
		p.frame++
		p.drawn = true
		return
	}
	quiet := now.Sub(p.said)
	if (elapsed >= firstLine && p.said.Before(p.since.Add(firstLine)) && quiet >= firstLine) || quiet >= heartbeat {
		fmt.Fprintf(p.a.stderr, "%s: %s ... %s\n", p.title, p.label(), formatTook(elapsed))
		p.said = now
	}
}

// update takes the operation as it is now.
func (p *progress) update(op *bangerv1.Operation) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if name := subject(op); p.title == "" || name != "" {
		p.title = name
	}
	stages := op.GetStages()
	for ; p.printed < len(stages) && stages[p.printed].GetFinishedAt() != nil; p.printed++ {
		s := stages[p.printed]
		p.finished(s, s.GetFinishedAt().AsTime().Sub(s.GetStartedAt().AsTime()))
	}
	p.running = nil
	if p.printed < len(stages) {
		s := stages[p.printed]
		if since := s.GetStartedAt().AsTime(); !since.Equal(p.since) {
			p.since = since
		}
		p.running = s
	}
}

func (p *progress) finished(s *bangerv1.OperationStage, took time.Duration) {
	if p.quiet || took < quietStage {
		return
	}
	p.clear()
	mark := ""
	if p.a.errTTY {
		mark = p.a.paintErr(green, "✓") + " "
	}
	fmt.Fprintf(p.a.stderr, "%s%s: %s %s\n", mark, p.title, client.StageText(s.GetName()), p.a.paintErr(dim, formatTook(took)))
	p.said = p.a.now()
}

func (p *progress) clear() {
	if p.drawn {
		fmt.Fprint(p.a.stderr, "\r\x1b[K")
		p.drawn = false
	}
}

// line prints a line of its own between what is redrawn.
func (p *progress) line(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	fmt.Fprintf(p.a.stderr, format+"\n", args...)
	p.said = p.a.now()
}

// end stops drawing and leaves the terminal's line empty.
func (p *progress) end() {
	close(p.stop)
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

// follow watches an operation until it ends, showing its stages unless quiet. The error is the
// operation's own fault, or that it could not be watched. The operation goes on in either case.
func (a *app) follow(ctx context.Context, c *client.Client, op *bangerv1.Operation, quiet bool) (*bangerv1.Operation, error) {
	p := a.progress(subject(op), quiet)
	last, err := c.WatchOperation(ctx, op.GetId(), client.Watcher{
		Changed: p.update,
		Lost: func(error) {
			p.line("%s: lost the connection to the daemon; connecting again", subject(op))
		},
	})
	p.end()
	if err != nil {
		if ctx.Err() != nil {
			return nil, errInterrupted
		}
		return nil, err
	}
	if f := last.GetFault(); f != nil {
		return last, client.FromFault(f)
	}
	if last.GetState() != "succeeded" {
		return last, fault.New(fault.Cancelled, subject(last), "the %s was %s", last.GetKind(), last.GetState())
	}
	return last, nil
}

// subject is what people know an operation by: the image that it is about, else its VM.
func subject(op *bangerv1.Operation) string {
	if op.GetImage() != "" {
		return op.GetImage()
	}
	return op.GetVmName()
}

// goesOn says how to come back to an operation that was left running.
func (a *app) goesOn(op *bangerv1.Operation) {
	if a.json {
		a.printError(fault.Wrap(errInterrupted, fault.Cancelled, subject(op), "the %s goes on in the daemon", op.GetKind()).
			WithHint("banger operation watch %s, or banger operation cancel %s", op.GetId(), op.GetId()))
		return
	}
	fmt.Fprintf(a.stderr, "%s: the %s goes on in the daemon\n  watch it:  banger operation watch %s\n  cancel it: banger operation cancel %s\n",
		subject(op), op.GetKind(), op.GetId(), op.GetId())
}
