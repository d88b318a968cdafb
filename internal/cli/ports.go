package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

func (a *app) portsCommand() *cobra.Command {
	o := &listOptions{}
	cmd := &cobra.Command{
		Use: "ports [VM...]", Short: "Show what listens in VMs",
		Long: `Show which ports are listened on in VMs, by which process, and whether a web server answers there. Without
names all VMs that run are shown. What listens on the guest's loopback alone cannot be reached by the network.

Keys that begin with "ports." choose and order the ports of each VM, all others the VMs.`,
		Example: `  banger vm ports calm-otter
  banger vm ports --watch
  banger vm ports --filter ports.scheme=http* --sort ports.port
  banger vm ports calm-otter -o json | jq '.[0].ports[] | select(.scheme != null)'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.output(a, cmd); err != nil {
				return err
			}
			take := func(ctx context.Context, c *client.Client) (look, error) {
				resp, err := c.VMs.GetPorts(ctx, &bangerv1.GetPortsRequest{Refs: args})
				if err != nil {
					return look{}, err
				}
				all := viewPorts(resp.GetResults())
				shown := applyPorts(all, o)
				l := look{json: shown, text: func(w io.Writer) error { return a.printPorts(w, shown, len(all), o.watching) }}
				for _, v := range shown {
					if v.err != nil {
						l.errs = append(l.errs, v.err)
					}
				}
				if a.output == outputName {
					l.json = slices.DeleteFunc(slices.Clone(shown), func(v portsView) bool { return v.err != nil })
				}
				l.over = allGone(args, l.errs)
				return l, nil
			}
			if o.watching {
				return a.watch(cmd.Context(), take)
			}
			return a.lookOnce(cmd.Context(), take)
		},
	}
	o.add(cmd, keysOf(portsView{}))
	return cmd
}

// applyPorts filters and sorts VMs by their keys, and the ports of each by those of ports. A VM without a port that is
// asked for is not shown; one whose ports are not known is.
func applyPorts(all []portsView, o *listOptions) []portsView {
	const inner = "ports."
	which, whichPorts := o.filters.split(inner)
	order, orderPorts := o.sort.split(inner)
	shown := []portsView{}
	for _, v := range applyTo(all, which, order, func(v portsView) bool { return v.ID != "" }) {
		v.Ports = apply(v.Ports, whichPorts, orderPorts)
		if len(v.Ports) > 0 || len(whichPorts.all) == 0 || v.err != nil {
			shown = append(shown, v)
		}
	}
	return shown
}

type portsView struct {
	Ref   string     `json:"ref"`
	ID    string     `json:"id,omitempty"`
	Name  string     `json:"name,omitempty"`
	Host  string     `json:"host,omitempty"`
	Ports []portView `json:"ports"`
	Error *errorView `json:"error,omitempty"`
	err   error
}

type portView struct {
	Protocol  string `json:"protocol"`
	Port      uint32 `json:"port"`
	Address   string `json:"address"`
	Reachable bool   `json:"reachable"` // by the network, if the VM has an address
	Endpoint  string `json:"endpoint,omitempty"`
	PID       int32  `json:"pid,omitempty"`
	Process   string `json:"process,omitempty"`
	Command   string `json:"command,omitempty"`
	Scheme    string `json:"scheme,omitempty"`
	Status    int32  `json:"status,omitempty"`
	Title     string `json:"title,omitempty"`
	loopback  bool
}

func viewPorts(results []*bangerv1.VMPorts) (views []portsView) {
	for _, r := range once(results) {
		v := portsView{Ref: r.GetRef(), ID: r.GetVm().GetId(), Name: r.GetVm().GetName(), Host: r.GetHost(), Ports: []portView{},
			err: client.FromFault(r.GetFault())}
		v.Error = viewError(v.err)
		for _, p := range r.GetPorts() {
			pv := portView{Protocol: p.GetProtocol(), Port: p.GetPort(), Address: p.GetAddress(), Reachable: !p.GetLoopback() && !p.GetUnreachable(), loopback: p.GetLoopback(),
				PID: p.GetPid(), Process: p.GetProcess(), Command: p.GetCommand(), Scheme: p.GetScheme(), Status: p.GetStatus(), Title: p.GetTitle()}
			if pv.Reachable && v.Host != "" {
				pv.Endpoint = v.Host + ":" + strconv.Itoa(int(pv.Port))
				if pv.Scheme != "" {
					pv.Endpoint = pv.Scheme + "://" + pv.Endpoint + "/"
				}
			}
			v.Ports = append(v.Ports, pv)
		}
		views = append(views, v)
	}
	return views
}

// printPorts is the table of a look. Errors follow it: on stderr, or below it where it is drawn over.
func (a *app) printPorts(w io.Writer, views []portsView, all int, watching bool) error {
	if len(views) == 0 {
		return a.nothing(w, all, "No VM runs. Start one: banger vm start NAME", watching)
	}
	var rows [][]cell
	var silent, nowhere []string
	for _, v := range views {
		switch {
		case v.err != nil:
		case len(v.Ports) == 0:
			silent = append(silent, v.Name)
		case v.Host == "":
			nowhere = append(nowhere, v.Name)
		}
		for _, p := range v.Ports {
			endpoint := cell{text: "-", color: dim}
			switch {
			case p.loopback:
				endpoint.text = "loopback only"
			case !p.Reachable:
				endpoint.text = "not reachable"
			case p.Endpoint != "":
				endpoint = cell{text: p.Endpoint}
				if p.Scheme != "" {
					endpoint.link = p.Endpoint
				}
			}
			web := client.WebText(p.Scheme, p.Status, p.Title)
			rows = append(rows, []cell{{text: v.Name}, {text: fmt.Sprintf("%d/%s", p.Port, p.Protocol)}, endpoint, {text: web}, {text: p.Process}, {text: p.Command, color: dim}})
		}
	}
	if len(rows) > 0 {
		if err := table(w, a.color, []string{"VM", "PORT", "ENDPOINT", "WEB", "PROCESS", "COMMAND"}, rows); err != nil {
			return err
		}
	}
	say, over := a.stderr, watching && a.color
	if over {
		say = w
	}
	for _, name := range silent {
		fmt.Fprintf(say, "%s: nothing listens\n", name)
	}
	for _, name := range nowhere {
		fmt.Fprintf(say, "%s: it has no address: its ports cannot be reached by the network\n", name)
	}
	for _, v := range views {
		switch {
		case v.err == nil:
		case over:
			fmt.Fprintln(say, v.err)
		default:
			a.printError(v.err)
		}
	}
	return nil
}
