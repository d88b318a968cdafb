package cli

import (
	"context"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

func (a *app) portsCommand() *cobra.Command {
	var watching bool
	cmd := &cobra.Command{
		Use: "ports [VM...]", Short: "Show what listens in VMs",
		Long: `Show which ports are listened on in VMs, by which process, and whether a web server answers there. Without
names all VMs that run are shown. What listens on the guest's loopback alone cannot be reached by the network.`,
		Example: `  banger vm ports calm-otter
  banger vm ports --watch
  banger vm ports calm-otter -o json | jq '.[0].ports[] | select(.scheme != null)'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			var failed error
			take := func(ctx context.Context) (look, error) {
				resp, err := c.VMs.GetPorts(ctx, &bangerv1.GetPortsRequest{Refs: args})
				if err != nil {
					return look{}, err
				}
				views, errs := viewPorts(resp.GetResults())
				failed = reportedAll(errs)
				return look{json: views, over: allGone(args, errs), text: func(w io.Writer) error { return a.printPorts(w, views, len(args) == 0, watching && a.color) }}, nil
			}
			if watching {
				return a.watch(cmd.Context(), take)
			}
			l, err := take(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				err = a.printJSON(l.json)
			} else {
				err = l.text(a.stdout)
			}
			if err != nil {
				return err
			}
			return failed
		},
	}
	cmd.Flags().BoolVarP(&watching, "watch", "w", false, "go on until Ctrl-C")
	return cmd
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
}

func viewPorts(results []*bangerv1.VMPorts) (views []portsView, errs []error) {
	views = []portsView{}
	for _, r := range once(results) {
		v := portsView{Ref: r.GetRef(), ID: r.GetVm().GetId(), Name: r.GetVm().GetName(), Host: r.GetHost(), Ports: []portView{},
			err: client.FromFault(r.GetFault())}
		if v.err != nil {
			v.Error = viewError(v.err)
			errs = append(errs, v.err)
		}
		for _, p := range r.GetPorts() {
			pv := portView{Protocol: p.GetProtocol(), Port: p.GetPort(), Address: p.GetAddress(), Reachable: !p.GetLoopback(),
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
	return views, errs
}

// printPorts is the table of a look. Errors follow it: on stderr, or below it where it is drawn over.
func (a *app) printPorts(w io.Writer, views []portsView, all, over bool) error {
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
			case !p.Reachable:
				endpoint.text = "loopback only"
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
	say := a.stderr
	if over {
		say = w
	}
	if len(views) == 0 && all {
		fmt.Fprintln(say, "No VM runs. Start one: banger vm start NAME")
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
