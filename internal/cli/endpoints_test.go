package cli

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
)

// TestLinkOfACell: on a terminal the text is a link (OSC 8), closed behind it; elsewhere nothing but the text is written.
func TestLinkOfACell(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cell  cell
		color bool
		want  string
	}{
		{"link", cell{text: "here", link: "https://web.vm:8443/"}, true, "\x1b]8;;https://web.vm:8443/\x1b\\here\x1b]8;;\x1b\\"},
		{"painted link", cell{text: "here", color: dim, link: "http://web.vm/"}, true, "\x1b]8;;http://web.vm/\x1b\\\x1b[2mhere\x1b[0m\x1b]8;;\x1b\\"},
		{"no terminal", cell{text: "here", color: dim, link: "https://web.vm:8443/"}, false, "here"},
		{"no link", cell{text: "here"}, true, "here"},
	} {
		if got := tt.cell.render(tt.color); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
	// A link takes no width: what stands behind it is where it is without.
	rows := [][]cell{{{text: "a", link: "http://a/"}, {text: "x"}}, {{text: "long"}, {text: "y"}}}
	var b bytes.Buffer
	if err := table(&b, true, nil, rows); err != nil {
		t.Fatal(err)
	}
	if want := "\x1b]8;;http://a/\x1b\\a\x1b]8;;\x1b\\     x\nlong  y\n"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

// TestEndpoints: what is reached at a VM's name is told as people give it to other programs, a URL of a web server being a link on a terminal.
func TestEndpoints(t *testing.T) {
	otter := &bangerv1.VM{Id: "0123456789abcdef", Name: "web"}
	results := []*bangerv1.VMPorts{
		{Ref: "web", Vm: otter, Host: "web.vm", Ports: []*bangerv1.Port{
			{Protocol: "tcp", Address: "::", Port: 8443, Process: "caddy", Scheme: "https", Status: 200, Title: "Otters"},
			{Protocol: "tcp", Address: "0.0.0.0", Port: 80, Process: "nginx", Scheme: "http", Status: 404},
			{Protocol: "tcp", Address: "0.0.0.0", Port: 22, Process: "sshd"},
			{Protocol: "tcp", Address: "127.0.0.1", Port: 5432, Loopback: true, Process: "postgres"},
			{Protocol: "tcp", Address: "::1", Port: 3000, Loopback: true, Process: "node", Scheme: "http", Status: 200},
			{Protocol: "udp", Address: "0.0.0.0", Port: 53, Process: "dnsmasq"},
		}},
		{Ref: "api", Vm: &bangerv1.VM{Id: "fedcba9876543210", Name: "api"}, Ports: []*bangerv1.Port{
			{Protocol: "tcp", Address: "0.0.0.0", Port: 80, Process: "nginx", Scheme: "http", Status: 200},
		}},
	}
	views := viewPorts(results)
	want := map[string][]string{"web": {"https://web.vm:8443/", "http://web.vm:80/", "web.vm:22", "", "", "web.vm:53"}, "api": {""}}
	got := map[string][]string{}
	for _, v := range views {
		for _, p := range v.Ports {
			got[v.Name] = append(got[v.Name], p.Endpoint)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	for color, want := range map[bool]string{
		false: `VM   PORT      ENDPOINT              WEB               PROCESS   COMMAND
web  8443/tcp  https://web.vm:8443/  https 200 Otters  caddy
web  80/tcp    http://web.vm:80/     http 404          nginx
web  22/tcp    web.vm:22                               sshd
web  5432/tcp  loopback only                           postgres
web  3000/tcp  loopback only         http 200          node
web  53/udp    web.vm:53                               dnsmasq
api  80/tcp    -                     http 200          nginx
`,
		true: `<2m>VM<0m>   <2m>PORT<0m>      <2m>ENDPOINT<0m>              <2m>WEB<0m>               <2m>PROCESS<0m>   <2m>COMMAND<0m>
web  8443/tcp  <link https://web.vm:8443/>https://web.vm:8443/<end>  https 200 Otters  caddy
web  80/tcp    <link http://web.vm:80/>http://web.vm:80/<end>     http 404          nginx
web  22/tcp    web.vm:22                               sshd
web  5432/tcp  <2m>loopback only<0m>                           postgres
web  3000/tcp  <2m>loopback only<0m>         http 200          node
web  53/udp    web.vm:53                               dnsmasq
api  80/tcp    <2m>-<0m>                     http 200          nginx
`,
	} {
		var out, errs bytes.Buffer
		a := &app{stderr: &errs, color: color}
		if err := a.printPorts(&out, views, len(views), false); err != nil {
			t.Fatal(err)
		}
		text := strings.NewReplacer("\x1b]8;;\x1b\\", "<end>", "\x1b]8;;", "<link ", "\x1b\\", ">", "\x1b[2m", "<2m>", "\x1b[0m", "<0m>").Replace(out.String())
		lines := strings.Split(text, "\n")
		for i := range lines {
			lines[i] = strings.TrimRight(lines[i], " ") // of an empty command
		}
		if diff := cmp.Diff(want, strings.Join(lines, "\n")); diff != "" {
			t.Errorf("colour %v: %s", color, diff)
		}
		if want := "api: it has no address: its ports cannot be reached by the network\n"; errs.String() != want {
			t.Errorf("on stderr %q, want %q", errs.String(), want)
		}
	}
}
