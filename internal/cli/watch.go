package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/charmbracelet/x/ansi"
	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

const (
	// watchEvery is the time between two looks at what no event tells of.
	watchEvery = 2 * time.Second
	// changesEvery is the least time between two looks: a create changes its VM a dozen times a second.
	changesEvery = 100 * time.Millisecond
	// agesEvery is how often ages are drawn anew on a terminal. Nothing is fetched for it.
	agesEvery = time.Second
)

// look is one look at something: what to print for people, and the value for --output json.
type look struct {
	text func(w io.Writer) error
	json any
	over error   // there is nothing more to look at
	errs []error // of some of what was asked for; text and json tell of them, names have no room for them
}

// lookOnce prints what take gives once. Its error is that of what could not be looked at.
func (a *app) lookOnce(ctx context.Context, take func(context.Context, *client.Client) (look, error)) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	l, err := take(ctx, c)
	if err != nil {
		return err
	}
	return a.print(l)
}

// print prints a look that is the only one. Its error is that of what could not be looked at.
func (a *app) print(l look) error {
	if !a.json {
		if err := l.text(a.stdout); err != nil {
			return err
		}
		return reportedAll(l.errs)
	}
	if err := a.printJSON(l.json); err != nil {
		return err
	}
	a.printUnnamed(l)
	return reportedAll(l.errs)
}

// printUnnamed says on stderr what names have no room for.
func (a *app) printUnnamed(l look) {
	if a.output != outputName {
		return
	}
	for _, err := range l.errs {
		a.printError(err)
	}
}

// onlooker gives a client of its own that starts no daemon: who only looks must not bring one back that somebody stopped.
func (a *app) onlooker() (*client.Client, error) {
	p, err := a.place()
	if err != nil {
		return nil, err
	}
	return client.New(client.Options{Socket: p.socket, StateDir: p.stateDir}), nil
}

// watched is an onlooker who finds a daemon, since the command has started one where none was.
func (a *app) watched(ctx context.Context) (*client.Client, error) {
	c, err := a.connect()
	if err != nil {
		return nil, err
	}
	if _, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{}); err != nil {
		return nil, err
	}
	return a.onlooker()
}

// absence is what people are told of a daemon that goes while it is watched: that it is gone, and that it is back.
type absence struct {
	a    *app
	gone bool
}

func (s *absence) begins(err error) {
	if s.gone {
		return
	}
	s.gone = true
	s.a.printError(fault.Wrap(err, fault.Unavailable, "", "the daemon is gone; this goes on when it is back").
		WithHint("any command that needs it starts it, e.g. banger vm list"))
}

// ends is called with whatever shows that there is a daemon.
func (s *absence) ends() {
	if s.gone && (!s.a.json || s.a.output == outputName) { // for programs a line on stdout says so
		fmt.Fprintf(s.a.stderr, "%s the daemon is back\n", s.a.paintErr(green, "banger:"))
	}
	s.gone = false
}

// watch prints a look every two seconds until Ctrl-C, which is its normal end, or until nobody reads it any more, or there
// is nothing more to look at. On a terminal each is drawn over the one before; elsewhere they follow one another, and as
// JSON each is one line. While there is no daemon it waits for one.
func (a *app) watch(ctx context.Context, take func(context.Context, *client.Client) (look, error)) error {
	ctx, cancel := a.whileRead(ctx)
	defer cancel()
	c, err := a.watched(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	daemon := absence{a: a}
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	for first := true; ; first = false {
		l, err := take(ctx, c)
		for client.Lost(err) && ctx.Err() == nil {
			daemon.begins(err)
			c.Close() // idle connections lead to the daemon that is lost
			if err = c.Await(ctx); err == nil {
				l, err = take(ctx, c)
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		daemon.ends()
		if err := a.draw(l, first); err != nil {
			return err
		}
		if l.over != nil {
			return l.over
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// watchChanges is watch of what the daemon tells: a look is printed whenever something changed, and nothing is
// asked for in between. While there is no daemon it waits for one: what that tells first is everything, and what
// changed meanwhile is printed.
func (a *app) watchChanges(ctx context.Context, take func(context.Context, *client.Client) (look, error)) error {
	ctx, cancel := a.whileRead(ctx)
	defer cancel()
	c, err := a.watched(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	changed, gone, ended := make(chan struct{}, 1), make(chan error), make(chan error, 1)
	go func() {
		ended <- c.Follow(ctx, client.Follower{
			Event: func(*bangerv1.WatchResponse) {
				select {
				case changed <- struct{}{}:
				default: // one look shows all changes before it
				}
			},
			Gone: func(err error) {
				select {
				case gone <- err:
				case <-ctx.Done():
				}
			},
		})
	}()
	var ages <-chan time.Time
	if a.color && !a.json {
		ticker := time.NewTicker(agesEvery)
		defer ticker.Stop()
		ages = ticker.C
	}
	var shown look
	var said []byte // by the last look that was printed
	daemon := absence{a: a}
	for first := true; ; {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			if ctx.Err() != nil {
				return nil
			}
			return err
		case err := <-gone:
			daemon.begins(err)
			continue
		case <-ages:
			if first || daemon.gone { // what was said of it stays to be read
				continue
			}
			if err := a.draw(shown, false); err != nil {
				return err
			}
			continue
		case <-changed:
		}
		l, err := take(ctx, c)
		switch {
		case ctx.Err() != nil:
			return nil
		case client.Lost(err): // which ends the stream as well: it is told by that, as is the next daemon
			continue
		case err != nil:
			return err
		}
		daemon.ends()
		shown = l
		now, err := asJSON(l.json, false)
		if err != nil {
			return err
		}
		if first || !bytes.Equal(now, said) { // most stages of operations change nothing that is listed
			if err := a.draw(l, first); err != nil {
				return err
			}
			first, said = false, now
		}
		select {
		case <-time.After(changesEvery):
		case <-ctx.Done():
		}
	}
}

func (a *app) draw(l look, first bool) error {
	if a.json {
		a.printUnnamed(l)
		return a.printValue(l.json, false)
	}
	var text bytes.Buffer
	if err := l.text(&text); err != nil {
		return err
	}
	if !a.color {
		if !first {
			text.WriteByte('\n')
		}
		_, err := a.stdout.Write(text.Bytes())
		return err
	}
	// Home, each line to its end, the rest of the screen: nothing flickers (ECMA-48: CUP, EL, ED).
	out := "\x1b[H"
	if first {
		out = "\x1b[2J\x1b[H"
	}
	out += strings.ReplaceAll(clip(text.String(), sizeOf(a.out)), "\n", "\x1b[K\n")
	_, err := io.WriteString(a.stdout, out+"\x1b[J")
	return err
}

// sizeOf is the size of a terminal in characters; zeros if it is none, or does not know.
func sizeOf(w io.Writer) unix.Winsize {
	if f, ok := w.(*os.File); ok && f != nil {
		if s, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			return *s
		}
	}
	return unix.Winsize{}
}

// clip makes text fit on a screen: one that scrolls, or a line that goes on in the next, cannot be drawn over. The last
// line is for the cursor, as is the last column: after a character there EL would take that away.
func clip(text string, size unix.Winsize) string {
	width, height := int(size.Col), int(size.Row)
	if width == 0 || height < 3 {
		return text
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if room := height - 1; len(lines) > room {
		lines = append(lines[:room-1], fmt.Sprintf("… %d more", len(lines)-room+1))
	}
	for i := range lines {
		lines[i] = ansi.Truncate(lines[i], width-1, "…")
	}
	return strings.Join(lines, "\n") + "\n"
}

// history is the latest values of one thing, oldest first.
type history []float64

// sparks is how many values a sparkline shows.
const sparks = 12

func (h *history) add(v float64) {
	*h = append(*h, v)
	*h = (*h)[max(0, len(*h)-sparks):]
}

// line draws the values as bars, the highest of which stands for top or the largest value, whichever is more.
func (h history) line(top float64) string {
	bars := []rune("▁▂▃▄▅▆▇█")
	for _, v := range h {
		top = max(top, v)
	}
	out := make([]rune, len(h))
	for i, v := range h {
		n := 0
		if top > 0 {
			n = int(v / top * float64(len(bars)-1))
		}
		out[i] = bars[min(max(n, 0), len(bars)-1)]
	}
	return string(out)
}
