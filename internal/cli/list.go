package cli

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"git.thaloco.com/thaloco/banger/client"
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

// add gives a command the flags that all lists have; keys are those of one thing in it.
func (o *listOptions) add(cmd *cobra.Command, keys []string) {
	o.filters.keys, o.sort.keys = keys, keys
	f := cmd.Flags()
	f.SortFlags = false
	f.Var(&o.filters, "filter", "only those with KEY=PATTERN or KEY!=PATTERN, a key of --output json; can be repeated")
	f.Var(&o.sort, "sort", "order by a key of --output json; -KEY: the largest first")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print names only")
	f.BoolVarP(&o.watching, "watch", "w", false, "go on with every change, until Ctrl-C")
}

// output makes --quiet the same as --output name.
func (o *listOptions) output(a *app, cmd *cobra.Command) error {
	if !o.quiet {
		return nil
	}
	if a.output == outputJSON || a.output == outputYAML || a.output == outputWide {
		return usage(cmd, "--quiet prints names: it does not go with --output %s", a.output)
	}
	a.output, a.json = outputName, true
	return nil
}

// listing makes cmd a command that lists: its arguments, its flags, what it does.
func listing[V any](a *app, cmd *cobra.Command, l list[V]) *cobra.Command {
	var zero V
	o := &listOptions{}
	o.add(cmd, keysOf(zero))
	cmd.Args = noArgs
	cmd.Annotations = map[string]string{wideAnnotation: "yes"}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := o.output(a, cmd); err != nil {
			return err
		}
		take := func(ctx context.Context, c *client.Client) (look, error) {
			all, err := l.fetch(ctx, c)
			if err != nil {
				return look{}, err
			}
			shown := apply(all, o.filters, o.sort)
			return look{json: shown, text: func(w io.Writer) error {
				if len(shown) == 0 {
					return a.nothing(w, len(all), l.empty, o.watching)
				}
				return table(w, a.color, l.header(a, shown), l.rows(a, shown))
			}}, nil
		}
		if o.watching {
			return a.watchChanges(cmd.Context(), take)
		}
		return a.lookOnce(cmd.Context(), take)
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
func apply[V any](all []V, which filters, order sortKey) []V {
	return applyTo(all, which, order, func(V) bool { return true })
}

// applyTo filters and sorts the answers to references. What is none of them (of) is an error of the command's, which no
// filter hides.
func applyTo[V any](all []V, which filters, order sortKey, of func(V) bool) []V {
	shown := []V{}
	for _, v := range all {
		if !of(v) || which.match(v) {
			shown = append(shown, v)
		}
	}
	if order.key != "" {
		slices.SortStableFunc(shown, func(x, y V) int { return order.compare(x, y) })
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
