package cli

import (
	"bytes"
	"context"
	"io"
	"time"
)

// watchEvery is the time between two looks of --watch.
const watchEvery = 2 * time.Second

// look is one look at something: what to print for people, and the value for --output json.
type look struct {
	text func(w io.Writer) error
	json any
	over error // there is nothing more to look at
}

// watch prints a look every two seconds until Ctrl-C, which is its normal end, or until there is nothing more to look at. On a terminal each is
// drawn over the one before; elsewhere they follow one another, and as JSON each is one line.
func (a *app) watch(ctx context.Context, take func(context.Context) (look, error)) error {
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	for first := true; ; first = false {
		l, err := take(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
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

func (a *app) draw(l look, first bool) error {
	if a.json {
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
	out := []byte("\x1b[H")
	if first {
		out = []byte("\x1b[2J\x1b[H")
	}
	out = append(out, bytes.ReplaceAll(text.Bytes(), []byte("\n"), []byte("\x1b[K\n"))...)
	_, err := a.stdout.Write(append(out, "\x1b[J"...))
	return err
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
