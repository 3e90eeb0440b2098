// A service that is up at once: accepts on loopback and says its process id. Same program for every supervisor.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);

	if (argc < 2)
		return 2;
	at.sin_port = htons(atoi(argv[1]));
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 64))
		return 1;
	for (;;) {
		int client = accept(listener, NULL, NULL);

		if (client < 0)
			continue;
		dprintf(client, "%d", getpid());
		close(client);
	}
}
