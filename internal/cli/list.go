package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// list is a command that lists things: all of them take the same flags, and differ in what they fetch and in
// their columns. V is the view of one thing, as --output json prints it.
type list[V any] struct {
	fetch   func(ctx context.Context, c *client.Client) ([]V, error)
	columns []column[V]
	empty   string // said on stderr if there is nothing at all
}

// column of the table that people get.
type column[V any] struct {
	title string
	of    func(v V) cell
	wide  bool // shown with --output wide only
	rare  bool // shown only if a row has something to say
}

// listOptions are the flags that every list has.
type listOptions struct {
	filters  filters
	sort     sortKey
	quiet    bool
	watching bool
}

// listing makes cmd a command that lists: its arguments, its flags, what it does.
func listing[V any](a *app, cmd *cobra.Command, l list[V]) *cobra.Command {
	var zero V
	keys := keysOf(zero)
	o := &listOptions{filters: filters{keys: keys}, sort: sortKey{keys: keys}}
	cmd.Args = noArgs
	cmd.Annotations = map[string]string{wideAnnotation: "yes"}
	f := cmd.Flags()
	f.SortFlags = false
	f.Var(&o.filters, "filter", "only those with KEY=PATTERN or KEY!=PATTERN, a key of --output json; can be repeated")
	f.Var(&o.sort, "sort", "order by a key of --output json; -KEY: the largest first")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print names only")
	f.BoolVarP(&o.watching, "watch", "w", false, "go on with every change, until Ctrl-C")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if o.quiet {
			if a.output == outputJSON || a.output == outputYAML || a.output == outputWide {
				return usage(cmd, "--quiet prints names: it does not go with --output %s", a.output)
			}
			a.output, a.json = outputName, true
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		take := func(ctx context.Context) (look, error) {
			all, err := l.fetch(ctx, c)
			if err != nil {
				return look{}, err
			}
			shown := apply(all, o)
			return look{json: shown, text: func(w io.Writer) error {
				if len(shown) == 0 {
					return a.nothing(w, len(all), l.empty, o.watching)
				}
				return table(w, a.color, l.header(a, shown), l.rows(a, shown))
			}}, nil
		}
		if o.watching {
			return a.watchChanges(cmd.Context(), c, take)
		}
		shown, err := take(cmd.Context())
		switch {
		case err != nil:
			return err
		case a.json:
			return a.printJSON(shown.json)
		}
		return shown.text(a.stdout)
	}
	return cmd
}

// nothing says that a list is empty: on stderr, or where it is drawn over.
func (a *app) nothing(w io.Writer, all int, empty string, watching bool) error {
	if all > 0 {
		empty = fmt.Sprintf("None of %d is so", all)
	}
	if !watching || !a.color {
		w = a.stderr
	}
	_, err := fmt.Fprintln(w, empty)
	return err
}

// apply filters and sorts. The result is never nil: it is printed as an array.
func apply[V any](all []V, o *listOptions) []V {
	shown := []V{}
	for _, v := range all {
		if o.filters.match(v) {
			shown = append(shown, v)
		}
	}
	if o.sort.key != "" {
		slices.SortStableFunc(shown, func(x, y V) int { return o.sort.compare(x, y) })
	}
	return shown
}

func (l list[V]) shownColumns(a *app, views []V) []column[V] {
	var out []column[V]
	for _, c := range l.columns {
		if c.wide && a.output != outputWide {
			continue
		}
		if c.rare && !slices.ContainsFunc(views, func(v V) bool { return c.of(v).text != "" }) {
			continue
		}
		out = append(out, c)
	}
	return out
}

func (l list[V]) header(a *app, views []V) []string {
	var out []string
	for _, c := range l.shownColumns(a, views) {
		out = append(out, c.title)
	}
	return out
}

func (l list[V]) rows(a *app, views []V) [][]cell {
	columns := l.shownColumns(a, views)
	rows := make([][]cell, len(views))
	for i, v := range views {
		for _, c := range columns {
			rows[i] = append(rows[i], c.of(v))
		}
		for n := len(rows[i]); n > 0 && rows[i][n-1].text == ""; n-- {
			rows[i] = rows[i][:n-1] // no space at the ends of lines
		}
	}
	return rows
}

const (
	// changesEvery is the least time between two looks: a create changes its VM a dozen times a second.
	changesEvery = 100 * time.Millisecond
	// agesEvery is how often ages are drawn anew on a terminal. Nothing is fetched for it.
	agesEvery = time.Second
)

// watchChanges prints a look whenever something changed, until Ctrl-C, which is its normal end. The daemon tells; nothing
// is asked for in between. An end of the daemon ends it with an error: what it would print from then on is not so.
func (a *app) watchChanges(ctx context.Context, c *client.Client, take func(context.Context) (look, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Daemon.Watch(ctx, &bangerv1.WatchRequest{})
	if err != nil {
		return client.FromConnect(err)
	}
	defer stream.Close()
	changed, ended := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		for stream.Receive() { // the first message is the state as it is
			select {
			case changed <- struct{}{}:
			default: // one look shows all changes before it
			}
		}
		ended <- stream.Err()
	}()
	var ages <-chan time.Time
	if a.color && !a.json {
		ticker := time.NewTicker(agesEvery)
		defer ticker.Stop()
		ages = ticker.C
	}
	var shown look
	var said []byte // by the last look that was printed
	for first := true; ; {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				err = errors.New("it ended the stream")
			}
			return fault.Wrap(client.FromConnect(err), fault.Unavailable, "", "the daemon that told of changes is gone").
				WithHint("the same command again starts it")
		case <-ages:
			if first {
				continue
			}
			if err := a.draw(shown, false); err != nil {
				return err
			}
			continue
		case <-changed:
		}
		l, err := take(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
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
