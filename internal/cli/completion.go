package cli

import (
	"context"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// completionTime bounds what a press of TAB waits for the daemon.
const completionTime = 500 * time.Millisecond

// complete gives every command and flag below cmd what the shell may propose for it, by the words of its usage line
// and the kind of its flags: a new command has it without a line of its own. What the command set itself stays.
func (a *app) complete(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		a.complete(sub)
	}
	if cmd.Annotations[groupAnnotation] != "" || cmd.Hidden {
		return
	}
	if cmd.ValidArgsFunction == nil {
		cmd.ValidArgsFunction = matching(a.argumentCompletion(arguments(cmd.Use)))
	}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if how := a.flagCompletion(f); how != nil {
			_ = cmd.RegisterFlagCompletionFunc(f.Name, matching(how)) // fails for a flag that has one
		}
	})
}

// matching leaves what begins as the word that is being typed.
func matching(all cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
		out, how := all(cmd, args, toComplete)
		return slices.DeleteFunc(slices.Clone(out), func(c cobra.Completion) bool { return !strings.HasPrefix(c, toComplete) }), how
	}
}

func (a *app) argumentCompletion(all []argumentSchema) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
		// cobra appends a "--" of its own, and does not tell it from one that was typed.
		if slices.Contains(a.args[:max(0, len(a.args)-1)], "--") {
			return nil, cobra.ShellCompDirectiveDefault // of a command in a guest nothing is known here
		}
		i := len(args)
		if n := len(all); i >= n && n > 0 && all[n-1].Repeated {
			i = n - 1
		}
		if i >= len(all) || all[i].AfterDash {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		switch all[i].Name {
		case "VM":
			return notYet(a.vmNames(cmd.Context()), args), cobra.ShellCompDirectiveNoFileComp
		case "IMAGE":
			return notYet(a.imageNames(cmd.Context()), args), cobra.ShellCompDirectiveNoFileComp
		case "OPERATION":
			return notYet(a.operationIDs(cmd.Context()), args), cobra.ShellCompDirectiveNoFileComp
		case "FILE", "DIRECTORY":
			return nil, cobra.ShellCompDirectiveDefault
		case "SOURCE", "DESTINATION": // a file here, or VM:PATH
			if strings.ContainsAny(toComplete, ":/.") {
				return nil, cobra.ShellCompDirectiveDefault
			}
			var out []cobra.Completion
			for _, name := range a.vmNames(cmd.Context()) {
				name, about, _ := strings.Cut(name, "\t")
				out = append(out, cobra.CompletionWithDesc(name+":", about))
			}
			return append(out, filesHere()...), cobra.ShellCompDirectiveNoSpace
		}
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
}

// filesHere are the files in this directory: where VMs are proposed, the shell itself proposes none.
func filesHere() []cobra.Completion {
	entries, err := os.ReadDir(".")
	if err != nil {
		return nil
	}
	var out []cobra.Completion
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() {
			name += "/"
		}
		if !strings.HasPrefix(name, ".") {
			out = append(out, name)
		}
	}
	return out
}

// flagCompletion is what may follow a flag; nil leaves it to the shell.
func (a *app) flagCompletion(f *pflag.Flag) cobra.CompletionFunc {
	fixed := func(words ...cobra.Completion) cobra.CompletionFunc {
		return cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
	}
	switch v := f.Value.(type) {
	case *choice:
		return fixed(v.allowed...)
	case *signalFlag:
		return fixed(signals()...)
	case *goal:
		return fixed("running", "ssh", "stopped", "port:")
	case *filters:
		return keyCompletion(v.keys, "=")
	case *sortKey:
		return keyCompletion(v.keys, "")
	case labels, *labelChanges:
		return func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.labelPairs(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
		}
	case *count, *size, *lineCount, *environment:
		return fixed()
	case *text:
		if f.Name == "image" {
			return func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
				return a.imageNames(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
			}
		}
		return fixed()
	}
	return nil
}

// outputCompletion proposes what the command has.
func (a *app) outputCompletion(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return outputsOf(cmd), cobra.ShellCompDirectiveNoFileComp
}

// keyCompletion proposes the keys of a list. After them comes something more, or after that of a map a word of the user's.
func keyCompletion(keys []string, after string) cobra.CompletionFunc {
	var out []cobra.Completion
	for _, key := range keys {
		if !strings.HasSuffix(key, ".") {
			key += after
		}
		out = append(out, key)
	}
	how := cobra.ShellCompDirectiveNoFileComp
	if after != "" {
		how |= cobra.ShellCompDirectiveNoSpace
	}
	return cobra.FixedCompletions(out, how)
}

func signals() []cobra.Completion {
	var out []cobra.Completion
	for n := unix.Signal(1); n < 32; n++ {
		if name := unix.SignalName(n); name != "" {
			out = append(out, strings.TrimPrefix(name, "SIG"))
		}
	}
	return out
}

// notYet leaves out what was typed already.
func notYet(all []cobra.Completion, args []string) []cobra.Completion {
	return slices.DeleteFunc(all, func(c cobra.Completion) bool {
		name, _, _ := strings.Cut(c, "\t")
		return slices.Contains(args, name)
	})
}

// ask calls the daemon for a completion: one that runs. None is started for it, and what goes wrong is nothing to
// propose: the command itself says it when it is run.
func ask[T any](ctx context.Context, a *app, call func(context.Context, *client.Client) (T, error)) (out T) {
	ctx, cancel := context.WithTimeout(ctx, completionTime)
	defer cancel()
	c, err := a.connectWith(false)
	if err != nil {
		return out
	}
	out, err = call(ctx, c)
	if err != nil {
		var none T
		return none
	}
	return out
}

func (a *app) vms(ctx context.Context) []*bangerv1.VM {
	return ask(ctx, a, func(ctx context.Context, c *client.Client) ([]*bangerv1.VM, error) {
		resp, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
		return resp.GetVms(), err
	})
}

func (a *app) vmNames(ctx context.Context) []cobra.Completion {
	var out []cobra.Completion
	for _, v := range a.vms(ctx) {
		out = append(out, cobra.CompletionWithDesc(v.GetName(), v.GetState()+", "+v.GetImage()))
	}
	return out
}

func (a *app) labelPairs(ctx context.Context) []cobra.Completion {
	var out []cobra.Completion
	for _, v := range a.vms(ctx) {
		for key, value := range v.GetLabels() {
			out = append(out, key+"="+value)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (a *app) imageNames(ctx context.Context) []cobra.Completion {
	return ask(ctx, a, func(ctx context.Context, c *client.Client) ([]cobra.Completion, error) {
		resp, err := c.Images.ListImages(ctx, &bangerv1.ListImagesRequest{})
		var out []cobra.Completion
		for _, im := range resp.GetImages() {
			about := formatBytes(im.GetSizeBytes())
			if im.GetIsDefault() {
				about += ", the default"
			}
			out = append(out, cobra.CompletionWithDesc(im.GetName(), about))
		}
		return out, err
	})
}

func (a *app) operationIDs(ctx context.Context) []cobra.Completion {
	return ask(ctx, a, func(ctx context.Context, c *client.Client) ([]cobra.Completion, error) {
		resp, err := c.Operations.ListOperations(ctx, &bangerv1.ListOperationsRequest{})
		var out []cobra.Completion
		for _, op := range resp.GetOperations() {
			out = append(out, cobra.CompletionWithDesc(op.GetId(), op.GetKind()+" of "+op.GetVmName()+", "+op.GetState()))
		}
		return out, err
	})
}

// completionCommand replaces cobra's, whose help and errors are not like ours.
func (a *app) completionCommand() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use: "completion SHELL", Short: "Print what makes a shell complete banger's commands and VMs",
		Long: `Print the script by which a shell completes banger: commands, flags, and the names of VMs and images. make install
puts it where the shells look; otherwise see the examples. bash needs the package bash-completion.`,
		Example: `  source <(banger completion bash)
  banger completion zsh > ~/.zfunc/_banger
  banger completion fish > ~/.config/fish/completions/banger.fish`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || !slices.Contains(shells, args[0]) {
				return usage(cmd, "%s takes one of %s", cmd.CommandPath(), strings.Join(shells, ", "))
			}
			return nil
		},
		ValidArgsFunction: cobra.FixedCompletions(shells, cobra.ShellCompDirectiveNoFileComp),
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.stdout, true)
			case "zsh":
				return root.GenZshCompletion(a.stdout)
			}
			return root.GenFishCompletion(a.stdout, true)
		},
	}
}
